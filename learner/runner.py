"""The contract between the epoch loop and whoever does the work, in process or on Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan
from statistics import mean
from typing import Protocol

from diffusion.lora import Snapshot
from diffusion.trajectory import Chunk, Receipt, Scores, Verdict
from learner.ledger import Ledger
from learner.quarantine import SetAside
from learner.update import Training


@dataclass(frozen=True)
class EpochResult:
    """What comes back of an epoch, in chunk order. Seconds: sampling and scoring overlap on Ray, where each is the
    time from the epoch's start until its last chunk was done."""

    chunks: Sequence[Chunk]
    receipts: list[Receipt]
    verdicts: list[Verdict]
    training: Training  # of rank 0: metrics are means over ranks
    sample_seconds: float
    score_seconds: float
    train_seconds: float
    set_aside: Sequence[SetAside] = ()  # the bad trajectories, of all ranks

    @property
    def rewards(self) -> list[float]:
        """Raw terminal reward of each trajectory that is not bad."""
        return [reward for verdict in self.verdicts for reward in verdict.rewards if not isnan(reward)]

    @property
    def reward_parts(self) -> dict[str, float]:
        """Of a weighted_sum: mean raw terminal score of each of its rewards."""
        parts = [verdict.parts for verdict in self.verdicts]
        return {label: mean(value for part in parts for value in part[label] if not isnan(value)) for label in parts[0]}


@dataclass
class Hooks:
    """What a runner tells the loop while it works."""

    say: Callable[[str], None] = print  # faults survived, a line each
    progress: Callable[[str, int, int], None] = lambda what, done, total: None


class Runner(Protocol):
    """Does epochs with one current policy version; `snapshot` is the one that the next chunks are sampled with.

    A runner is made from a config and, to go on from a checkpoint, that checkpoint's files.
    """

    snapshot: Snapshot
    description: str
    dimensions: int  # D, numbers in one latent
    ranks: int
    batch_sizes: dict[str, int]  # micro_batch: transitions; score: images. As given, or as free memory had it
    hooks: Hooks

    def train_epoch(self, epoch: int, beta: float, chunks: Sequence[Chunk], ledger: Ledger) -> EpochResult:
        """Sample, score and train on the chunks, then publish the next policy version."""
        ...

    def evaluate(self, chunks: Sequence[Chunk]) -> list[Scores]:
        """Scores and images of the evaluation chunks under the current version, in their order."""
        ...

    def checkpoint_files(self) -> dict[str, bytes]:
        """The learner's state (learner/state.py) and, under lora/, the adapter for other programs."""
        ...

    def close(self) -> None:
        """Stop everything that was started; safe to call twice."""
        ...
