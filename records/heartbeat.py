"""The driver's sign of life, `status.json` in the run's folder, and what is known of a run from its files alone: for
whoever looks from outside (commands/status.py). A run never reads its sign of life, and goes on where it cannot be
written. Imports neither numpy nor pyarrow: a look takes no time."""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import psutil

from records import checkpoint, facts
from records.facts import Warn
from records.passwords import without_passwords
from records.shapes import Beat
from records.storage import Storage, StorageError

FILE, REPORT = "status.json", "report.html"
SECONDS, OBJECT_STORE_SECONDS = 5.0, 30.0  # between two writes at least
QUIET = 6  # so many times that without a sign is cause for worry
GOING_ON = "starting", "running"  # states of a run that does something
EVENTS = 10  # the last ones are kept
EPOCHS = 6  # last ones, of the estimate


class Heartbeat:
    """Writes the file every few seconds, when one of its methods is called."""

    def __init__(self, storage: Storage, epochs: int, mlflow_uri: str | None, quiet_seconds: float) -> None:
        """`epochs` the run is to have. While it starts, or where turns come only between pieces of work,
        `quiet_seconds` may pass without a sign."""
        self._vitals: Callable[[], dict[str, Any]] = dict  # of the runner, once it runs
        self._storage, self._seconds = storage, SECONDS if storage.local else OBJECT_STORE_SECONDS
        self._facts: dict[str, Any] = {"doing": "starting", "done": 0, "total": 0, "events": 0, "last_events": []}
        identity = {"process": os.getpid(), "host": socket.gethostname(), "since": time.time(), "epochs": epochs}
        uri, quiet = without_passwords(mlflow_uri) if mlflow_uri else None, max(quiet_seconds, QUIET * self._seconds)
        self._write(state="starting", reason=None, mlflow=uri, quiet_seconds=quiet, **identity)

    def running(self, vitals: Callable[[], dict[str, Any]], turns: bool) -> None:
        """With `turns`, `turn` is called all the time from now on."""
        self._vitals = vitals
        self._write(state="running", **({"quiet_seconds": QUIET * self._seconds} if turns else {}))

    def progress(self, doing: str, done: int, total: int) -> None:
        """`done` of `total` pieces of what is being done."""
        self._facts |= {"doing": doing, "done": done, "total": total}
        self.turn()

    def event(self, text: str) -> None:
        """A fault that was survived, a node that came or went: a line of the run's output."""
        self._facts["events"] += 1
        self._facts["last_events"] = [*self._facts["last_events"], {"time": time.time(), "text": text}][-EVENTS:]

    def turn(self, closed: bool = False) -> None:
        """Write if it is time to; where a write costs little, also when an epoch is `closed`."""
        if time.monotonic() >= self._due or (closed and self._storage.local):
            self._write()

    def end(self, state: str, reason: str | None = None) -> None:
        """The last one: finished, failed or stopped, and why."""
        self._vitals = dict  # the runner is gone
        self._write(state=state, reason=reason)

    def _write(self, **facts: Any) -> None:
        self._facts |= facts
        with contextlib.suppress(StorageError):  # if the records cannot be written either, that ends the run
            self._storage.write_json(FILE, self._facts | {"time": time.time()} | self._vitals())
        self._due = time.monotonic() + self._seconds


def look(storage: Storage, now: float, warn: Warn = lambda text: None) -> dict[str, Any]:
    """The run's state at time `now` (seconds since 1970), with all that a program may want to know; what is not known
    is None. `warn` hears of damage that can be done without. Raises a StorageError where there is no run, or it cannot.
    """
    about = facts.about(storage, warn)
    lines = facts.lines(storage, checkpoint.newest(storage, about["run_id"]), warn)
    beat: dict[str, Any] = {}
    try:
        beat = storage.read_json(FILE, Beat, "the run writes it anew") if storage.exists(FILE) else {}
    except StorageError as error:
        warn(str(error))
    trained, last = [line for line in lines if line["epoch"] >= 0], lines[-1] if lines else {}
    left, state = (beat.get("epochs") or 0) - len(trained), _state(about, beat, now)
    usual = median(line["seconds"] for line in trained[-EPOCHS:]) if trained else None
    told = "reason", "process", "host", "since", "epochs", "staleness", "epochs_in_work", "actors", "waiting", "running"
    return {
        **{key: about.get(key) for key in ("name", "run_id", "mlflow_run_id")},
        "directory": str(storage),
        "state": state,
        **{key: beat.get(key) for key in (*told, "mlflow")},
        "last_sign_seconds": max(0.0, now - beat["time"]) if beat else None,
        "doing": {key: beat.get(key) for key in ("doing", "done", "total")} if state in GOING_ON else None,
        "epochs_done": len(trained),
        **{key: last.get(key, 0) for key in ("step", "policy_version")},
        "epoch_seconds": usual,
        "seconds_left": usual * max(0, left) if usual is not None and state == "running" else None,
        "lost_trajectories": sum(line.get("lost_trajectories") or 0 for line in trained),
        "events": beat.get("events", 0),
        "last_events": beat.get("last_events", []),
        "lora": checkpoint.lora_folder(storage) if checkpoint.steps(storage) else None,
        "report": f"{storage}/{REPORT}" if REPORT in storage.entries() else None,
        "lines": [{key: value for key, value in line.items() if key != "updates"} for line in lines],
    }


def _state(about: dict[str, Any], beat: dict[str, Any], now: float) -> str:
    """starting, running, finished, failed, stopped, silent (no sign of life for longer than it promised), gone (its
    process is no more) or unknown."""
    if about.get("finished"):  # whatever else was to be done then
        return "finished"
    if beat.get("state") in ("starting", "running"):
        if beat["host"] == socket.gethostname() and not psutil.pid_exists(beat["process"]):
            return "gone"
        if now - beat["time"] > beat["quiet_seconds"]:
            return "silent"
    return beat.get("state", "unknown")
