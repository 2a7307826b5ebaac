"""The records that travel: a chunk of work, the trajectories made of it, and their rewards."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
    """The unit of work: fixed prompts and a fixed batch, so its result depends on nothing else."""

    index: int  # within (purpose, epoch)
    purpose: Purpose
    epoch: int
    seed: int  # keys the noise
    prompts: tuple[str, ...]  # B
    trajectory_ids: tuple[int, ...]  # B, unique within (purpose, epoch); they name the noise
    # B each, or none: row i is trajectory parents[i] until its state forks[i], and goes on from there with own noise.
    parents: tuple[int, ...] = ()
    forks: tuple[int, ...] = ()
    metadata: tuple[Mapping[str, Any], ...] = ()  # B, or none: the other columns of each prompt, for the reward

    def metadata_of(self, rows: Iterable[int]) -> tuple[Mapping[str, Any], ...]:
        return tuple(self.metadata[row] for row in rows) if self.metadata else ()

    def noise_ids(self, step: int) -> tuple[int, ...]:
        """Whose noise each row takes, by the steps of diffusion/noise.py. Rows of one are equal in state `step`."""
        if not self.parents:
            return self.trajectory_ids
        rows = zip(self.trajectory_ids, self.parents, self.forks, strict=True)
        return tuple(parent if step <= fork else own for own, parent, fork in rows)

    @property
    def key(self) -> ChunkKey:
        return ChunkKey(self.purpose, self.epoch, self.index)


@dataclass(frozen=True)
class Trajectories:
    """B denoising trajectories of N transitions, of one policy version. Arrays are float32 where no other type is said;
    states and model outputs may be float16 (state_precision). Latents are in the model's own scale."""

    chunk: Chunk
    policy_version: int
    adapter_sha256: str  # of the adapter as it stood in the sampler's module
    timesteps: np.ndarray  # [N] int64, decreasing
    states: np.ndarray  # [B, N+1, C, H, W] noise -> data: states[:, i] is x at timesteps[i], states[:, N] is x_0
    log_pf: np.ndarray  # [B, N] nats, summed over dimensions, of the rollout's own weights and the states as stored
    log_pb: np.ndarray  # [B, N] nats, summed over dimensions, of the states as stored; 0 where a kernel has no p_B
    selected: np.ndarray  # [B, K] int64 steps to train on, ascending
    model_output: np.ndarray  # [B, K, C, H, W] the rollout's guided output at the selected steps
    # [B, N] nats, summed over dimensions: log p_F of the frozen reference; None where it was not asked for. Transitions
    # without noise have no density: there all three are 0.
    log_ref: np.ndarray | None = None

    def receipt(self, node: str, seconds: float) -> "Receipt":
        log_pf, log_pb = (tuple(each.sum(1, dtype=np.float64).tolist()) for each in (self.log_pf, self.log_pb))
        return Receipt(self.policy_version, self.adapter_sha256, log_pf, log_pb, node, seconds)


@dataclass(frozen=True)
class Receipt:
    """A sampler's account of one chunk of B trajectories, small enough for the driver; arrays stay where they are."""

    policy_version: int
    adapter_sha256: str  # of the adapter as it stood in the sampler's module
    log_pf_sum: tuple[float, ...]  # [B] nats, over the N transitions
    log_pb_sum: tuple[float, ...]  # [B] nats, over the N transitions
    node: str  # where it was sampled
    seconds: float  # that it took


@dataclass(frozen=True)
class CleanPredictions:
    """What the reward actors get: M clean latents to decode, one for every state whose reward is needed."""

    chunk: Chunk
    num_steps: int  # N
    latents: np.ndarray  # [M, C, H, W] of the states' type: clean predictions, and x_0 itself where step is N
    row: np.ndarray  # [M] int64 its trajectory in the chunk, 0..B-1
    step: np.ndarray  # [M] int64 its state's index, 0..N
    terminal: int  # the state whose reward is the trajectory's in training: N, or an earlier one
    nats: "Nats | None" = None
    spread: np.ndarray | None = None  # [B, N] float32, of diffusion/calibration.py, while it is measured


@dataclass(frozen=True)
class Nats:
    """How far a chunk's policy is from the frozen reference, along its trajectories; 0 where no noise is added."""

    log_ratio: np.ndarray  # [B, N] float32, log p_F - log p_ref of the transition that was drawn, over all dimensions
    kl: np.ndarray  # [B, N] float32, KL(p_F || p_ref) at the state: the mean of the former over what could be drawn


@dataclass(frozen=True)
class Scores:
    """Raw rewards of one chunk, never multiplied by beta, and what was made with them."""

    chunk: Chunk
    rewards: np.ndarray  # [B, N+1] float32, NaN where no state needed one and in bad rows
    images: np.ndarray | None = None  # [B, H, W, 3] uint8 of x_0, of evaluation chunks alone
    thumbnails: tuple[bytes, ...] = ()  # B PNG files of x_0, of training chunks alone
    gradients: np.ndarray | None = None  # [M, C, H, W] float32, of the raw reward to the clean latents
    gradient_row: np.ndarray | None = None  # [B, N+1] int64, row in `gradients` of each state's; -1: none, then it is 0
    parts: dict[str, np.ndarray] = field(default_factory=dict)  # label -> [B] raw score of x_0 by each reward of a sum
    bad: dict[int, str] = field(default_factory=dict)  # row -> reason why it must not be used
    bad_images: dict[int, bytes] = field(default_factory=dict)  # row -> PNG file of its image, if there is one to show
    # Of evaluation chunks, NaN in bad rows: label -> [B] by each reward that is not trained on; [B, F] float32
    held_out: dict[str, np.ndarray] = field(default_factory=dict)
    features: np.ndarray | None = None
    nats: Nats | None = None  # the sampler's, as is
    spread: np.ndarray | None = None

    @property
    def good_ids(self) -> tuple[int, ...]:
        return tuple(number for row, number in enumerate(self.chunk.trajectory_ids) if row not in self.bad)

    def verdict(self, seconds: float) -> "Verdict":
        parts = {label: tuple(values.tolist()) for label, values in self.parts.items()}
        return Verdict(tuple(self.rewards[:, -1].tolist()), self.thumbnails, seconds, parts, dict(self.bad))


@dataclass(frozen=True)
class Verdict:
    """A scorer's account of one chunk of B trajectories: raw terminal rewards, the parts of a sum, small pictures."""

    rewards: tuple[float, ...]  # [B] raw, of x_0, NaN of bad ones
    thumbnails: tuple[bytes, ...]  # B PNG files, or none
    seconds: float  # that scoring took
    parts: dict[str, tuple[float, ...]] = field(default_factory=dict)  # label -> [B] raw
    bad: dict[int, str] = field(default_factory=dict)  # row -> reason
