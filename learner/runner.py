"""The contract between the epoch loop and whoever does the work, in process or on Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from diffusion.lora import Snapshot
from diffusion.trajectory import Chunk, Scores


@dataclass(frozen=True)
class EpochResult:
    """What comes back of an epoch. Seconds: sampling and scoring overlap on Ray, where each is the time from
    the epoch's start until its last chunk was done."""

    rewards: list[float]  # raw terminal reward of each trajectory
    metrics: dict[str, float]  # of Learner.train_epoch
    sample_seconds: float
    score_seconds: float
    train_seconds: float


class Runner(Protocol):
    """Does epochs with one current policy version; `snapshot` is the one that the next chunks are sampled with."""

    snapshot: Snapshot
    description: str
    dimensions: int  # D, numbers in one latent

    def train_epoch(self, epoch: int, beta: float, chunks: Sequence[Chunk]) -> EpochResult:
        """Sample, score and train on the chunks, then publish the next policy version."""
        ...

    def evaluate(self, chunks: Sequence[Chunk]) -> list[Scores]:
        """Scores and images of the evaluation chunks under the current version, in their order."""
        ...

    def save_lora(self, folder: Path) -> None:
        """Write the current adapter for other programs."""
        ...

    def close(self) -> None:
        """Stop everything that was started; safe to call twice."""
        ...
