"""A run over the emulated parts in a process of its own, which may kill itself (SIGKILL) at a point of its protocol:

    python driver.py [--point NAME] [--fault ROLE STATE KIND] [--folder FOLDER] [--seconds S S S] -- [key=value ...]

FOLDER gets the witness; seconds are those of a chunk's sampling and scoring, and of an epoch's training. Points are
functions of the product, wrapped by name: nothing in it knows of them.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import injected
from injected import WITNESS, Fault

from actors.learner_group import LearnerGroup
from actors.ray_runner import RayRunner
from actors.rollouts import Rollouts
from benchmarks import emulated
from benchmarks.emulated import Emulation
from learner import build, controller, run
from learner.protocol.buffer import Buffer
from learner.protocol.ledger import Ledger
from records import checkpoint, storage
from records.run_folder import Records
from records.storage import Storage
from reports.views import RunViews

STEP = "checkpoints/step-000004"  # epochs are 0, 1, 2; epoch 1 ends with this checkpoint
Which = Callable[[tuple[Any, ...], dict[str, Any]], bool]  # of the positional and the named arguments


@dataclass(frozen=True)
class Point:
    """Before or after a call of a function: the `nth` of those that `which` is true of."""

    owner: Any
    name: str
    before: bool
    nth: int = 1
    which: Which = lambda arguments, named: True

    def arm(self, strike: Callable[[], None]) -> None:
        real, calls = getattr(self.owner, self.name), []

        def wrapped(*arguments: Any, **named: Any) -> Any:
            calls.append(self.which(arguments, named))
            now = calls[-1] and sum(calls) == self.nth
            if now and self.before:
                strike()
            result = real(*arguments, **named)
            if now and not self.before:
                strike()
            return result

        setattr(self.owner, self.name, wrapped)


def _argument(place: int, value: Any) -> Which:
    """Of calls whose argument at this place (0 is self, of methods) begins with the value, or is it."""

    def which(arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
        found = arguments[place] if place < len(arguments) else None
        return found.startswith(value) if isinstance(value, str) and isinstance(found, str) else found == value

    return which


def _of_epoch_1(arguments: tuple[Any, ...], _: dict[str, Any]) -> bool:
    return (arguments[1].purpose, arguments[1].epoch) == ("train", 1)


def _old_folder(arguments: tuple[Any, ...], _: dict[str, Any]) -> bool:
    return str(arguments[0]).endswith(storage.GONE) and Path(arguments[0]).exists()


BEFORE, AFTER = True, False
POINTS = {
    "before the lock": Point(Storage, "lock", BEFORE),
    "lock taken": Point(Storage, "lock", AFTER),
    "before run.json": Point(Records, "note", BEFORE),
    "run.json written": Point(Records, "note", AFTER),
    "actors up": Point(RayRunner, "_start", AFTER),
    "first evaluation": Point(RayRunner, "evaluate", AFTER),
    "first evaluation written": Point(Records, "save_evaluation", AFTER),
    "first metrics line": Point(Records, "append", AFTER),
    "before the first checkpoint": Point(checkpoint, "save", BEFORE),
    "first checkpoint": Point(checkpoint, "save", AFTER),
    "ledger opened": Point(Ledger, "open", AFTER, 1, _argument(1, 1)),
    "chunks admitted": Point(Buffer, "admit", AFTER, 2),
    "chunk handed to a sampler": Point(Buffer, "given", AFTER, 2, _of_epoch_1),
    "chunk sampled": Point(Buffer, "sampled", AFTER, 2, _of_epoch_1),
    "chunk scored": Point(Buffer, "scored", AFTER, 2, _of_epoch_1),
    "epoch whole": Point(Buffer, "take", BEFORE, 1, _argument(1, 1)),
    "before the fetch": Point(LearnerGroup, "fetch", BEFORE, 1, _argument(1, 1)),
    "fetched": Point(LearnerGroup, "fetch", AFTER, 1, _argument(1, 1)),
    "training call sent": Point(LearnerGroup, "_answers", BEFORE, 1, _argument(2, "training of epoch 1")),
    "training answered": Point(LearnerGroup, "_answers", AFTER, 1, _argument(2, "training of epoch 1")),
    "state files got": Point(LearnerGroup, "state_files", AFTER, 3),
    "before the publication": Point(Rollouts, "publish", BEFORE, 3),
    "published": Point(Rollouts, "publish", AFTER, 3),
    "ledger closed": Point(Ledger, "close", AFTER, 1, _argument(1, 1)),
    "before the trajectories": Point(Records, "save_trajectories", BEFORE, 1, _argument(1, 1)),
    "trajectories written": Point(Records, "save_trajectories", AFTER, 1, _argument(1, 1)),
    "evaluation written": Point(Records, "save_evaluation", AFTER, 1, _argument(1, 1)),
    "before the metrics": Point(Records, "append", BEFORE, 3),
    "metrics appended": Point(Records, "append", AFTER, 3),
    "checkpoint aside": Point(Storage, "remove", BEFORE, 1, _argument(1, STEP)),
    "checkpoint renamed": Point(Storage, "write_folder", AFTER, 1, _argument(1, STEP)),
    "latest linked": Point(Storage, "link", AFTER, 3),
    "half pruned": Point(storage.shutil, "rmtree", BEFORE, 1, _old_folder),
    "pruned": Point(checkpoint, "prune", AFTER, 3),
    "buffer closed": Point(RayRunner, "closed", AFTER, 2),
    "before the report": Point(RunViews, "_draw_report", BEFORE),
    "before the end": Point(controller, "finish", BEFORE),
    "noted as finished": Point(Records, "note", AFTER, 1, lambda _, named: bool(named.get("finished"))),
    "after the end": Point(controller, "finish", AFTER),
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--point", choices=POINTS)
    parser.add_argument("--fault", nargs=3, metavar=("ROLE", "STATE", "KIND"))
    parser.add_argument("--seconds", nargs=3, type=float, default=(0.0, 0.0, 0.0))
    parser.add_argument("settings", nargs="*")
    args = parser.parse_args()
    sample, score, train = args.seconds
    emulation = Emulation(sample_seconds=sample, score_seconds=score, train_seconds=train)

    def strike() -> None:
        (args.folder / WITNESS).touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)

    parts = emulated.parts(emulation)
    if args.fault:
        parts = injected.parts(parts, Fault(*args.fault, str(args.folder)))
    build.parts = lambda config, own_reward=None: parts
    if args.point:
        POINTS[args.point].arm(strike)
    return run.main(args.settings)


if __name__ == "__main__":
    sys.exit(main())
