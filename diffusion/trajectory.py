"""The records that travel: a chunk of work, the trajectories made of it, and their rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Purpose = Literal["train", "evaluate"]


@dataclass(frozen=True)
class Chunk:
    """The unit of work: fixed prompts and a fixed batch, so its result depends on nothing else.

    `trajectory_ids` are unique within (purpose, epoch) and name the noise; `seed` keys it.
    """

    index: int
    purpose: Purpose
    epoch: int
    seed: int
    prompts: tuple[str, ...]
    trajectory_ids: tuple[int, ...]


@dataclass(frozen=True)
class Trajectories:
    """B denoising trajectories of N transitions, rolled out by one policy version.

    Arrays are float32 numpy (zero-copy through the object store). States run noise -> data:
    `states[:, i]` is x at `timesteps[i]`, `states[:, N]` is x_0. Latents are in the model's own scale.
    """

    chunk: Chunk
    policy_version: int
    adapter_sha256: str  # of the adapter as it stood in the sampler's module
    timesteps: np.ndarray  # [N] int64
    states: np.ndarray  # [B, N+1, C, H, W]
    log_pf: np.ndarray  # [B, N] nats, summed over dimensions, of the rollout's own weights
    selected: np.ndarray  # [B, K] int64 steps to train on, ascending
    model_output: np.ndarray  # [B, K, C, H, W] the rollout's guided output at the selected steps


@dataclass(frozen=True)
class CleanPredictions:
    """What the reward actors get: clean latents to decode, one for every state whose reward is needed.

    `step[j]` is the state index (0..N) of row j and `row[j]` its trajectory in the chunk; the row of the
    terminal state (step N) holds x_0 itself.
    """

    chunk: Chunk
    num_steps: int  # N
    latents: np.ndarray  # [M, C, H, W] float32
    row: np.ndarray  # [M] int64
    step: np.ndarray  # [M] int64


@dataclass(frozen=True)
class Scores:
    """Raw rewards, never multiplied by beta: [B, N+1] float32, NaN where no state needed one.

    `images` [B, H, W, 3] uint8 of the terminal states, only for evaluation chunks.
    """

    chunk: Chunk
    rewards: np.ndarray
    images: np.ndarray | None = None
