"""The ledger: every trajectory id of an epoch is issued, sampled, scored and trained (or, being bad, quarantined)
exactly once. What went with an actor or a node is issued again and counted as lost; whatever else departs from the
order is a defect, and ends the run: LedgerError."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from diffusion.failures import RunFailure

BEFORE = {  # each stage, and those before it
    "issued": ("issued", "sampled", "scored"),  # again
    "sampled": ("issued",),
    "scored": ("sampled",),
    "trained": ("scored",),
    "quarantined": ("scored",),
}


class LedgerError(RunFailure, RuntimeError):
    """A trajectory that was lost, or would have been used twice."""


class Ledger:
    """Accounts of the epochs in work, and totals over the closed ones: what is in work may have to be done again."""

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        """`saved` is a checkpoint's `to_json`."""
        saved = saved or {}
        self.epochs = int(saved.get("epochs", 0))  # closed
        self.totals: dict[str, int] = dict.fromkeys((*BEFORE, "lost"), 0) | saved.get("totals", {})
        self._stages: dict[int, dict[int, str]] = {}  # of each trajectory, by epoch in work
        self._lost: Counter[int] = Counter()

    def to_json(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "totals": dict(self.totals)}

    @property
    def following(self) -> int:  # the epoch to be issued next
        return self.epochs + len(self._stages)

    def open(self, epoch: int, ids: Iterable[int]) -> None:
        """Issue an epoch's trajectories. Epochs come in order, each once; several may be in work."""
        if epoch != self.following:
            raise LedgerError(f"epoch {epoch} was issued, but {self.following} is next")
        self._stages[epoch] = dict.fromkeys(ids, "issued")

    def advance(self, epoch: int, ids: Iterable[int], stage: str) -> None:
        stages = self._stages.get(epoch, {})
        for number in ids:
            if (now := stages.get(number)) not in BEFORE[stage]:
                raise LedgerError(f"trajectory {number} of epoch {epoch} cannot be {stage}: it is {now or 'unknown'}")
            stages[number] = stage
            self._lost[epoch] += stage == "issued"

    def close(self, epoch: int) -> int:
        """The epoch, the first in work, is trained or quarantined; returns how many trajectories were made again."""
        if epoch != self.epochs or epoch not in self._stages:
            raise LedgerError(f"epoch {epoch} was to be closed, but {self.epochs} is next")
        stages = self._stages[epoch]
        if left := sorted(number for number, stage in stages.items() if stage not in ("trained", "quarantined")):
            raise LedgerError(f"epoch {epoch}: {len(left)} trajectories were not trained on, first {left[0]}")
        lost = self._lost.pop(epoch, 0)
        passed = Counter({stage: len(stages) for stage in ("issued", "sampled", "scored")}) + Counter(stages.values())
        for stage, count in {**passed, "lost": lost}.items():
            self.totals[stage] += count
        self.epochs += 1
        del self._stages[epoch]
        return lost
