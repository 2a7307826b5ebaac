"""The ledger: every trajectory id of an epoch is issued, sampled, scored and trained (or, being bad, quarantined)
exactly once.

A chunk whose actor died goes back to `issued` and is counted as lost; whatever else departs from the order is a
defect, and ends the run rather than training on something twice or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

STAGES = ("issued", "sampled", "scored", "trained")
ENDS = (STAGES.index("trained"), len(STAGES))  # trained or quarantined


class LedgerError(RuntimeError):
    """A trajectory that was lost, or would have been used twice."""


class Ledger:
    """Accounts of one epoch at a time, and totals over the run."""

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        """`saved` is a checkpoint's `to_json`."""
        saved = saved or {}
        self.epochs = int(saved.get("epochs", 0))  # closed
        self.totals: dict[str, int] = dict.fromkeys((*STAGES, "quarantined", "lost"), 0) | saved.get("totals", {})
        self._stage: dict[int, int] = {}
        self._epoch: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "totals": dict(self.totals)}

    def open(self, epoch: int, ids: Sequence[int]) -> None:
        """Issue an epoch's trajectories. Epochs come in order, each once.

        Raises:
            LedgerError: another epoch is next, or an id is issued twice.
        """
        if epoch != self.epochs:
            raise LedgerError(f"epoch {epoch} was issued, but {self.epochs} is next")
        self._epoch, self._stage = epoch, dict.fromkeys(ids, 0)
        if len(self._stage) != len(ids):
            raise LedgerError(f"epoch {epoch} issued a trajectory id twice")
        self.totals["issued"] += len(ids)

    def advance(self, ids: Iterable[int], stage: str) -> None:
        """Move trajectories to `stage` from the one before it.

        Raises:
            LedgerError: one of them is not there; names it.
        """
        goal, count = STAGES.index(stage), 0
        for number in ids:
            now = self._stage.get(number)
            if now != goal - 1:
                self._refuse(number, stage)
            self._stage[number] = goal
            count += 1
        self.totals[stage] += count

    def set_aside(self, ids: Iterable[int]) -> None:
        """Scored trajectories that are bad are not trained on: quarantined.

        Raises:
            LedgerError: one of them is not scored, or is trained already.
        """
        for number in ids:
            if self._stage.get(number) != STAGES.index("scored"):
                self._refuse(number, "quarantined")
            self._stage[number] = len(STAGES)
            self.totals["quarantined"] += 1

    def _refuse(self, number: int, stage: str) -> NoReturn:
        now = self._stage.get(number)
        found = "was never issued" if now is None else f"is {(*STAGES, 'quarantined')[now]}"
        raise LedgerError(f"trajectory {number} of epoch {self._epoch} was to be {stage}, but {found}")

    def lose(self, ids: Iterable[int]) -> None:
        """Sampled trajectories are gone before they were scored, or never came: they will be made again.

        Raises:
            LedgerError: one of them is past that.
        """
        for number in ids:
            now = self._stage.get(number)
            if now not in (0, 1):
                raise LedgerError(f"trajectory {number} of epoch {self._epoch} cannot be made again")
            self.totals["sampled"] -= now
            self._stage[number] = 0
            self.totals["lost"] += 1

    def close(self) -> None:
        """The epoch is over.

        Raises:
            LedgerError: not everything issued was trained on or quarantined.
        """
        left = sorted(number for number, stage in self._stage.items() if stage not in ENDS)
        if left:
            raise LedgerError(f"epoch {self._epoch}: {len(left)} trajectories were not trained on, first {left[0]}")
        self.epochs += 1
        self._epoch, self._stage = None, {}
