"""Chunks on their way from issue to training, and the bound on how stale they may be. Bookkeeping alone, no Ray.

    admitted -> given to a sampler -> sampled -> scored -> taken for training -> closed

Version v of the policy is what v epochs of training made. Epoch e is trained by version e; its trajectories may be
sampled by any of the versions e - max_staleness .. e. The bound is held twice: an epoch is admitted only when that many
epochs before it are closed, and older weights are refused when a sampler is given the chunk. What is not yet given to a
sampler gets the newest weights. At most max_staleness + 1 epochs are in work: that bounds the object store too."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, ChunkKey, Receipt, Verdict
from learner.protocol import receipts
from learner.protocol.ledger import Ledger
from learner.protocol.receipts import StaleWeights

Account = tuple[Chunk, Receipt, Verdict]
ChunksOf = Callable[[int], Sequence[Chunk]]  # of an epoch


@dataclass
class Work:
    """One chunk and what has been made of it. `trajectories`, `clean` and `scores` are references, not looked into."""

    chunk: Chunk
    snapshot: Snapshot | None = None  # the weights that it was given to a sampler with
    trajectories: Any = None
    clean: Any = None  # predictions for the scorer, until they are scored
    scores: Any = None
    receipt: Receipt | None = None
    verdict: Verdict | None = None

    def account(self) -> Account:
        """Of a scored chunk, without the references: they keep memory."""
        assert self.receipt is not None and self.verdict is not None
        return self.chunk, self.receipt, self.verdict


class Buffer:
    """The work of a run from its next epoch on, and of evaluations, which no ledger counts."""

    def __init__(self, chunks_of: ChunksOf, epochs: range, max_staleness: int, ledger: Ledger) -> None:
        self.chunks_of, self.epochs, self.max_staleness, self.ledger = chunks_of, epochs, max_staleness, ledger
        self.closed = epochs.start  # epochs in a checkpoint; `epochs` are those left to train
        self.works: dict[ChunkKey, Work] = {}

    def admit(self) -> list[Chunk]:
        """Chunks of the epochs that may begin now; each comes once."""
        fresh: list[Chunk] = []
        while (epoch := self.ledger.following) in self.epochs and epoch <= self.closed + self.max_staleness:
            chunks = self.chunks_of(epoch)
            self.ledger.open(epoch, [number for chunk in chunks for number in chunk.trajectory_ids])
            fresh += chunks
        self.add(fresh)
        return fresh

    def add(self, chunks: Sequence[Chunk]) -> None:
        self.works |= {chunk.key: Work(chunk) for chunk in chunks}

    def given(self, key: ChunkKey, snapshot: Snapshot) -> None:
        """A sampler gets the chunk, for the first time or again, with these weights. Raises StaleWeights if they are
        not of the chunk's epoch, or of the max_staleness before."""
        if key.purpose == "train" and not 0 <= key.epoch - snapshot.version <= self.max_staleness:
            limit = f"train.max_staleness is {self.max_staleness}"
            raise StaleWeights(f"{key} was to be sampled by policy version {snapshot.version}: {limit}")
        self.works[key].snapshot = snapshot

    def sampled(self, key: ChunkKey, receipt: Receipt, trajectories: Any, clean: Any = None) -> None:
        """Raises StaleWeights if the sampler had other weights than it was given."""
        work = self.works[key]
        assert work.snapshot is not None
        receipts.check(receipt, {work.snapshot.version: work.snapshot.sha256}, str(key))
        work.receipt, work.trajectories, work.clean = receipt, trajectories, clean
        self._advance(work.chunk, "sampled")

    def scored(self, key: ChunkKey, verdict: Verdict, scores: Any) -> None:
        work = self.works[key]
        work.verdict, work.scores, work.clean = verdict, scores, None
        self._advance(work.chunk, "scored")

    def lose(self, key: ChunkKey) -> None:
        """What was made of the chunk is gone: it will be made again, by whatever weights are the newest then."""
        chunk = self.works[key].chunk
        self._advance(chunk, "issued")
        self.works[key] = Work(chunk)

    def part(self, purpose: str, epoch: int | None = None) -> list[Work]:
        """An epoch, or the evaluation, of whatever kind, in chunk order."""
        chunks = ((work, work.chunk) for work in self.works.values())
        part = [work for work, chunk in chunks if chunk.purpose == purpose and epoch in (None, chunk.epoch)]
        return sorted(part, key=lambda work: work.chunk.index)

    def take(self, epoch: int, version: int) -> list[Work]:
        """A whole epoch, to be trained on by policy `version`: StaleWeights if that is not the epoch's number."""
        if version != epoch:
            raise StaleWeights(f"epoch {epoch} was to be trained by policy version {version}")
        return self.part("train", epoch)

    @property
    def in_work(self) -> int:  # epochs admitted and not closed yet
        return self.ledger.following - self.closed

    def close(self, epoch: int) -> None:
        """The epoch is in a checkpoint: nothing of it is needed any more, and another one may begin."""
        for work in self.part("train", epoch):
            del self.works[work.chunk.key]
        self.closed = epoch + 1

    def _advance(self, chunk: Chunk, stage: str) -> None:
        if chunk.purpose == "train":
            self.ledger.advance(chunk.epoch, chunk.trajectory_ids, stage)
