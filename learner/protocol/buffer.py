"""Chunks on their way from issue to training, and the bound on how stale they may be. Bookkeeping alone, no Ray.

    admitted -> given to a sampler -> sampled -> scored -> taken for training -> closed

Version v of the policy is what v epochs of training made. Epoch e is trained by version e; its trajectories may be
sampled by any of the versions e - max_staleness .. e. The bound is held twice: an epoch is admitted only when that many
epochs before it are closed, and whatever is older all the same is refused when it is taken. With max_staleness 0
sampling waits for every update, as in the papers. Finished work is kept across weight changes; what is not yet given
to a sampler gets the newest weights. At most max_staleness + 1 epochs are in work: that bounds the object store too,
and makes the samplers wait for a slow learner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion.failures import RunFailure
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, ChunkKey, Receipt, Verdict
from learner.protocol import receipts
from learner.protocol.ledger import Ledger


class TooStale(RunFailure, RuntimeError):
    """Trajectories sampled by a policy further behind than train.max_staleness allows: a defect, never trained on."""


@dataclass
class Work:
    """One chunk and what has been made of it. `trajectories`, `clean` and `scores` are references, not looked into."""

    chunk: Chunk
    snapshot: Snapshot | None = None  # the weights that it was given to a sampler with
    trajectories: Any = None
    clean: Any = None
    scores: Any = None
    receipt: Receipt | None = None
    verdict: Verdict | None = None


class Buffer:
    """The work of a run from its next epoch on, and of evaluations, which no ledger counts."""

    def __init__(
        self, chunks_of: Callable[[int], Sequence[Chunk]], epochs: range, max_staleness: int, ledger: Ledger
    ) -> None:  # fmt: skip
        """`epochs` are those left to train."""
        self.chunks_of, self.epochs, self.max_staleness, self.ledger = chunks_of, epochs, max_staleness, ledger
        self.closed = epochs.start  # epochs that are done: trained, recorded, in a checkpoint
        self._next = epochs.start  # to be admitted
        self._work: dict[ChunkKey, Work] = {}

    def admit(self) -> list[Chunk]:
        """Chunks of the epochs that may begin now; each comes once."""
        fresh: list[Chunk] = []
        while self._next < self.epochs.stop and self._next <= self.closed + self.max_staleness:
            chunks = self.chunks_of(self._next)
            self.ledger.open(self._next, [number for chunk in chunks for number in chunk.trajectory_ids])
            fresh += chunks
            self._next += 1
        self._work |= {chunk.key: Work(chunk) for chunk in fresh}
        return fresh

    def add_evaluation(self, chunks: Sequence[Chunk]) -> None:
        self._work |= {chunk.key: Work(chunk) for chunk in chunks}

    def work(self, key: ChunkKey) -> Work:
        return self._work[key]

    def given(self, key: ChunkKey, snapshot: Snapshot) -> None:
        """A sampler gets the chunk, for the first time or again, with these weights.

        Raises:
            TooStale: they are too old for the chunk's epoch.
        """
        work = self._work[key]
        self._check_age(work.chunk, snapshot.version)
        work.snapshot = snapshot

    def sampled(self, key: ChunkKey, receipt: Receipt, trajectories: Any, clean: Any) -> None:
        """
        Raises:
            StaleWeights: the sampler had other weights than it was given.
        """
        work = self._work[key]
        assert work.snapshot is not None
        receipts.check(receipt, work.snapshot, str(key))
        work.receipt, work.trajectories, work.clean = receipt, trajectories, clean
        self._advance(work.chunk, "sampled")

    def scored(self, key: ChunkKey, verdict: Verdict, scores: Any) -> None:
        work = self._work[key]
        work.verdict, work.scores, work.clean = verdict, scores, None
        self._advance(work.chunk, "scored")

    def lose(self, key: ChunkKey) -> None:
        """What was made of the chunk is gone: it will be made again, by whatever weights are the newest then."""
        work = self._work[key]
        if work.chunk.purpose == "train":
            self.ledger.lose(work.chunk.epoch, work.chunk.trajectory_ids)
        self._work[key] = Work(work.chunk)

    def counts(self, purpose: str, epoch: int) -> tuple[int, int]:
        """Chunks of a part that are scored, and all of them."""
        part = self._part(purpose, epoch)
        return sum(work.scores is not None for work in part), len(part)

    def take(self, epoch: int, version: int) -> list[Work]:
        """A whole epoch, in chunk order, to be trained on by policy `version`; it stays here until it is closed.

        Raises:
            TooStale: a trajectory is further behind than max_staleness.
        """
        if version != epoch:
            raise TooStale(f"epoch {epoch} was to be trained by policy version {version}")
        part = self._part("train", epoch)
        for work in part:
            assert work.receipt is not None
            self._check_age(work.chunk, work.receipt.policy_version)
        return part

    def evaluated(self) -> list[Work]:
        """The evaluation's chunks that are scored by now, in order. They stay here until they are dropped."""
        return [work for work in self._part("evaluate", 0) if work.scores is not None]

    def drop(self, key: ChunkKey) -> None:
        """Nothing of the chunk is needed any more."""
        del self._work[key]

    @property
    def in_work(self) -> int:
        """Epochs admitted and not closed yet."""
        return self._next - self.closed

    def staleness(self, epoch: int) -> list[int]:
        """Versions that each chunk of an epoch was behind when it is trained on."""
        return [epoch - work.snapshot.version for work in self._part("train", epoch) if work.snapshot]

    def close(self, epoch: int) -> None:
        """The epoch is trained, recorded and in a checkpoint: nothing of it is needed any more, and another one may
        begin."""
        for work in self._part("train", epoch):
            del self._work[work.chunk.key]
        self.closed = epoch + 1

    def _part(self, purpose: str, epoch: int) -> list[Work]:
        part = [work for work in self._work.values() if (work.chunk.purpose, work.chunk.epoch) == (purpose, epoch)]
        return sorted(part, key=lambda work: work.chunk.index)

    def _advance(self, chunk: Chunk, stage: str) -> None:
        if chunk.purpose == "train":
            self.ledger.advance(chunk.epoch, chunk.trajectory_ids, stage)

    def _check_age(self, chunk: Chunk, version: int) -> None:
        if chunk.purpose == "train" and not 0 <= chunk.epoch - version <= self.max_staleness:
            raise TooStale(
                f"chunk {chunk.index} of epoch {chunk.epoch} was sampled by policy version {version}: "
                f"train.max_staleness is {self.max_staleness}"
            )
