"""The ledger: every trajectory id of an epoch is issued, sampled, scored and trained (or, being bad, quarantined)
exactly once.

A chunk that an actor or a node took with it goes back to `issued` and is counted as lost; whatever else departs from
the order is a defect, and ends the run rather than training on something twice or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from diffusion.failures import RunFailure

STAGES = ("issued", "sampled", "scored", "trained")
QUARANTINED, LOST = "quarantined", "lost"


class LedgerError(RunFailure, RuntimeError):
    """A trajectory that was lost, or would have been used twice."""


class Ledger:
    """Accounts of the epochs in work, and totals over the closed ones: what is in work may have to be done again."""

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        """`saved` is a checkpoint's `to_json`."""
        saved = saved or {}
        self.epochs = int(saved.get("epochs", 0))  # closed
        self.totals: dict[str, int] = dict.fromkeys((*STAGES, QUARANTINED, LOST), 0) | saved.get("totals", {})
        self._stages: dict[int, dict[int, str]] = {}  # of each trajectory, by epoch in work, in their order
        self._lost: Counter[int] = Counter()

    def to_json(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "totals": dict(self.totals)}

    def open(self, epoch: int, ids: Sequence[int]) -> None:
        """Issue an epoch's trajectories. Epochs come in order, each once; several may be in work.

        Raises:
            LedgerError: another epoch is next, or an id is issued twice.
        """
        following = self.epochs + len(self._stages)
        if epoch != following:
            raise LedgerError(f"epoch {epoch} was issued, but {following} is next")
        stages = dict.fromkeys(ids, STAGES[0])
        if len(stages) != len(ids):
            raise LedgerError(f"epoch {epoch} issued a trajectory id twice")
        self._stages[epoch] = stages

    def advance(self, epoch: int, ids: Iterable[int], stage: str) -> None:
        """Move an epoch's trajectories to `stage` from the one before it.

        Raises:
            LedgerError: one of them is not there; names it.
        """
        self._move(epoch, ids, stage, f"was to be {stage}, but", STAGES[STAGES.index(stage) - 1])

    def set_aside(self, epoch: int, ids: Iterable[int]) -> None:
        """Scored trajectories that are bad are not trained on: quarantined.

        Raises:
            LedgerError: one of them is not scored, or is trained already.
        """
        self._move(epoch, ids, QUARANTINED, "was to be quarantined, but", "scored")

    def lose(self, epoch: int, ids: Sequence[int]) -> None:
        """Trajectories, or their scores, are gone before they were trained on, or never came: made again.

        Raises:
            LedgerError: one of them is past that.
        """
        self._move(epoch, ids, STAGES[0], "cannot be made again: it", *STAGES[:-1])
        self._lost[epoch] += len(ids)

    def _move(self, epoch: int, ids: Iterable[int], goal: str, fault: str, *sources: str) -> None:
        stages = self._stages.get(epoch, {})
        for number in ids:
            stage = stages.get(number)
            if stage not in sources:
                state = f"is {stage}" if stage else "was never issued"
                raise LedgerError(f"trajectory {number} of epoch {epoch} {fault} {state}")
            stages[number] = goal

    def close(self, epoch: int) -> int:
        """The epoch, the first in work, is over; returns how many trajectories had to be made again.

        Raises:
            LedgerError: not everything issued was trained on or quarantined, or an earlier epoch is in work.
        """
        if epoch != self.epochs or epoch not in self._stages:
            raise LedgerError(f"epoch {epoch} was to be closed, but {self.epochs} is next")
        stages = self._stages[epoch]
        left = sorted(number for number, stage in stages.items() if stage not in ("trained", QUARANTINED))
        if left:
            raise LedgerError(f"epoch {epoch}: {len(left)} trajectories were not trained on, first {left[0]}")
        lost, ends = self._lost.pop(epoch, 0), Counter(stages.values())
        made = dict.fromkeys(STAGES[:-1], len(stages))
        for stage, count in {**made, **ends, LOST: lost}.items():
            self.totals[stage] += count
        self.epochs += 1
        del self._stages[epoch]
        return lost
