"""The records that travel: a chunk of work, the trajectories made of it, and their rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Purpose = Literal["train", "evaluate"]


@dataclass(frozen=True)
class ChunkKey:
    """Names a chunk within a run; as text, for messages."""

    purpose: Purpose
    epoch: int
    index: int

    def __str__(self) -> str:
        return f"chunk {self.index} of {self.where}"

    @property
    def where(self) -> str:
        return f"epoch {self.epoch}" if self.purpose == "train" else "the evaluation set"


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

    @property
    def key(self) -> ChunkKey:
        return ChunkKey(self.purpose, self.epoch, self.index)

    @property
    def where(self) -> str:
        """For messages."""
        return self.key.where


@dataclass(frozen=True)
class Trajectories:
    """B denoising trajectories of N transitions, rolled out by one policy version.

    Arrays are float32 numpy (zero-copy through the object store), or float16 where RolloutSettings.state_precision
    says so; log-probabilities are float32 always, and of the states as stored. States run noise -> data:
    `states[:, i]` is x at `timesteps[i]`, `states[:, N]` is x_0. Latents are in the model's own scale.
    """

    chunk: Chunk
    policy_version: int
    adapter_sha256: str  # of the adapter as it stood in the sampler's module
    timesteps: np.ndarray  # [N] int64
    states: np.ndarray  # [B, N+1, C, H, W]
    log_pf: np.ndarray  # [B, N] nats, summed over dimensions, of the rollout's own weights
    log_pb: np.ndarray  # [B, N] nats, summed over dimensions
    selected: np.ndarray  # [B, K] int64 steps to train on, ascending
    model_output: np.ndarray  # [B, K, C, H, W] the rollout's guided output at the selected steps

    def receipt(self, node: str, seconds: float) -> Receipt:
        """What the driver is told, made on `node` in `seconds`."""
        return Receipt(
            policy_version=self.policy_version,
            adapter_sha256=self.adapter_sha256,
            log_pf_sum=tuple(self.log_pf.sum(1, dtype=np.float64).tolist()),
            log_pb_sum=tuple(self.log_pb.sum(1, dtype=np.float64).tolist()),
            node=node,
            seconds=seconds,
        )


@dataclass(frozen=True)
class Receipt:
    """A sampler's account of one chunk of B trajectories, small enough for the driver: the arrays stay where they are.

    Version and hash are of the adapter as it stood in the sampler's module. Sums are over the N transitions, in nats.
    """

    policy_version: int
    adapter_sha256: str
    log_pf_sum: tuple[float, ...]  # B
    log_pb_sum: tuple[float, ...]  # B
    node: str  # where it was sampled
    seconds: float


@dataclass(frozen=True)
class CleanPredictions:
    """What the reward actors get: clean latents to decode, one for every state whose reward is needed.

    `step[j]` is the state index (0..N) of row j and `row[j]` its trajectory in the chunk; the row of the
    terminal state (step N) holds x_0 itself.
    """

    chunk: Chunk
    num_steps: int  # N
    latents: np.ndarray  # [M, C, H, W] float32, or as the states
    row: np.ndarray  # [M] int64
    step: np.ndarray  # [M] int64
    terminal: int  # the state whose reward is the trajectory's in training: N, or N-1


@dataclass(frozen=True)
class Scores:
    """Raw rewards, never multiplied by beta: [B, N+1] float32, NaN where no state needed one.

    `gradients` [M, C, H, W] float32 of the raw reward with respect to the clean latents, for objectives that learn
    from them; `gradient_row` [B, N+1] int64 is the row of each state's, -1 where there is none (then it is 0). `images`
    [B, H, W, 3] uint8 of the terminal states, only for evaluation chunks; `thumbnails` are B PNG files of them, only
    for training chunks. Where the reward is a sum of several, `parts` has each one's raw score of x_0 [B] by its label.
    `bad` has the reason why a row must not be used: its rewards are NaN; `bad_images` the PNG of its image, if there is
    one to show. Of evaluation chunks `held_out` has the raw scores of the images [B] by each reward that is not trained
    on, by label, and `features` [B, F] float32 (rewards/judges.py); NaN of bad rows.
    """

    chunk: Chunk
    rewards: np.ndarray
    images: np.ndarray | None = None
    thumbnails: tuple[bytes, ...] = ()
    gradients: np.ndarray | None = None
    gradient_row: np.ndarray | None = None
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)
    bad_images: dict[int, bytes] = field(default_factory=dict)
    held_out: dict[str, np.ndarray] = field(default_factory=dict)
    features: np.ndarray | None = None

    @property
    def good_ids(self) -> tuple[int, ...]:
        """Trajectories that are not bad, in order."""
        return tuple(number for row, number in enumerate(self.chunk.trajectory_ids) if row not in self.bad)

    def verdict(self, seconds: float) -> Verdict:
        """What the driver is told of a chunk scored in `seconds`."""
        parts = {label: tuple(values.tolist()) for label, values in self.parts.items()}
        return Verdict(tuple(self.rewards[:, -1].tolist()), self.thumbnails, seconds, parts, dict(self.bad))


@dataclass(frozen=True)
class Verdict:
    """A scorer's account of one chunk of B trajectories: raw terminal rewards, the parts of a sum, small pictures."""

    rewards: tuple[float, ...]  # B, NaN of bad ones
    thumbnails: tuple[bytes, ...]  # B PNG files, or none
    seconds: float
    parts: dict[str, tuple[float, ...]] = field(default_factory=dict)  # B each
    bad: dict[int, str] = field(default_factory=dict)  # row -> reason
