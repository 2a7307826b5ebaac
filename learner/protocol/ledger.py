"""The ledger: every trajectory id of an epoch is issued, sampled, scored and trained (or, being bad, quarantined)
exactly once.

A chunk that an actor or a node took with it goes back to `issued` and is counted as lost; whatever else departs from
the order is a defect, and ends the run rather than training on something twice or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from diffusion.failures import RunFailure

STAGES = ("issued", "sampled", "scored", "trained")
ENDS = (STAGES.index("trained"), len(STAGES))  # trained or quarantined


class LedgerError(RunFailure, RuntimeError):
    """A trajectory that was lost, or would have been used twice."""


class Ledger:
    """Accounts of the epochs in work, and totals over the closed ones: what is in work may have to be done again."""

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        """`saved` is a checkpoint's `to_json`."""
        saved = saved or {}
        self.epochs = int(saved.get("epochs", 0))  # closed
        self.totals: dict[str, int] = dict.fromkeys((*STAGES, "quarantined", "lost"), 0) | saved.get("totals", {})
        self._stage: dict[int, dict[int, int]] = {}  # of the epochs in work, in their order
        self._lost: Counter[int] = Counter()

    def to_json(self) -> dict[str, Any]:
        return {"epochs": self.epochs, "totals": dict(self.totals)}

    def open(self, epoch: int, ids: Sequence[int]) -> None:
        """Issue an epoch's trajectories. Epochs come in order, each once; several may be in work.

        Raises:
            LedgerError: another epoch is next, or an id is issued twice.
        """
        following = self.epochs + len(self._stage)
        if epoch != following:
            raise LedgerError(f"epoch {epoch} was issued, but {following} is next")
        stage = dict.fromkeys(ids, 0)
        if len(stage) != len(ids):
            raise LedgerError(f"epoch {epoch} issued a trajectory id twice")
        self._stage[epoch] = stage

    def advance(self, epoch: int, ids: Iterable[int], stage: str) -> None:
        """Move an epoch's trajectories to `stage` from the one before it.

        Raises:
            LedgerError: one of them is not there; names it.
        """
        goal, stages = STAGES.index(stage), self._stage.get(epoch, {})
        for number in ids:
            now = stages.get(number)
            if now != goal - 1:
                self._refuse(epoch, number, stage)
            stages[number] = goal

    def set_aside(self, epoch: int, ids: Iterable[int]) -> None:
        """Scored trajectories that are bad are not trained on: quarantined.

        Raises:
            LedgerError: one of them is not scored, or is trained already.
        """
        stages = self._stage.get(epoch, {})
        for number in ids:
            if stages.get(number) != STAGES.index("scored"):
                self._refuse(epoch, number, "quarantined")
            stages[number] = len(STAGES)

    def _refuse(self, epoch: int, number: int, stage: str) -> NoReturn:
        now = self._stage.get(epoch, {}).get(number)
        found = "was never issued" if now is None else f"is {(*STAGES, 'quarantined')[now]}"
        raise LedgerError(f"trajectory {number} of epoch {epoch} was to be {stage}, but {found}")

    def lose(self, epoch: int, ids: Iterable[int]) -> None:
        """Trajectories, or their scores, are gone before they were trained on, or never came: made again.

        Raises:
            LedgerError: one of them is past that.
        """
        stages = self._stage.get(epoch, {})
        for number in ids:
            if stages.get(number) not in (0, 1, 2):
                raise LedgerError(f"trajectory {number} of epoch {epoch} cannot be made again")
            stages[number] = 0
            self._lost[epoch] += 1

    def close(self, epoch: int) -> int:
        """The epoch, the first in work, is over; returns how many trajectories had to be made again.

        Raises:
            LedgerError: not everything issued was trained on or quarantined, or an earlier epoch is in work.
        """
        if epoch != self.epochs or epoch not in self._stage:
            raise LedgerError(f"epoch {epoch} was to be closed, but {self.epochs} is next")
        stages = self._stage[epoch]
        left = sorted(number for number, stage in stages.items() if stage not in ENDS)
        if left:
            raise LedgerError(f"epoch {epoch}: {len(left)} trajectories were not trained on, first {left[0]}")
        bad = sum(stage == len(STAGES) for stage in stages.values())
        for stage in STAGES:
            self.totals[stage] += len(stages)
        self.totals["trained"] -= bad
        self.totals["quarantined"] += bad
        lost = self._lost.pop(epoch, 0)
        self.totals["lost"] += lost
        self.epochs += 1
        del self._stage[epoch]
        return lost
