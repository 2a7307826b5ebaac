"""The driver's sign of life: `status.json` in the run directory, what the records do not say of a run in progress.

A view for whoever looks from outside (commands/status.py) and may reach nothing but the files. A run never reads it,
and where it cannot be written the run goes on without it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable
from typing import Any

from records.storage import Storage, StorageError

FILE = "status.json"
SECONDS, OBJECT_STORE_SECONDS = 5.0, 30.0  # between two writes at least
QUIET = 6  # so many times that without a sign is cause for worry
EVENTS = 10  # the last ones are kept


class Heartbeat:
    """Writes the file every few seconds, when one of its methods is called."""

    def __init__(self, storage: Storage, epochs: int, mlflow_uri: str | None, quiet_seconds: float) -> None:
        """`epochs` the run is to have. While it starts, or where turns come only between pieces of work,
        `quiet_seconds` may pass without a sign."""
        self._vitals: Callable[[], dict[str, Any]] = dict  # of the runner, once it runs
        self._storage = storage
        self._seconds = SECONDS if storage.local else OBJECT_STORE_SECONDS
        self._due = 0.0
        self._events: list[dict[str, Any]] = []
        self._facts: dict[str, Any] = {
            "state": "starting",
            "reason": None,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": time.time(),
            "epochs": epochs,
            "mlflow": without_passwords(mlflow_uri) if mlflow_uri else None,
            "doing": "starting",
            "done": 0,
            "total": 0,
            "events": 0,
            "quiet_seconds": max(quiet_seconds, QUIET * self._seconds),
        }
        self._write()

    def running(self, vitals: Callable[[], dict[str, Any]], turns: bool) -> None:
        """The run has started. With `turns`, `turn` is called all the time."""
        self._vitals = vitals
        self._facts["state"] = "running"
        if turns:
            self._facts["quiet_seconds"] = QUIET * self._seconds
        self._write()

    def progress(self, doing: str, done: int, total: int) -> None:
        """`done` of `total` chunks of what is being done."""
        self._facts |= {"doing": doing, "done": done, "total": total}
        self.turn()

    def event(self, text: str) -> None:
        """A fault that was survived, a node that came or went: a line of the run's output."""
        self._facts["events"] += 1
        self._events = [*self._events, {"time": time.time(), "text": text}][-EVENTS:]

    def turn(self) -> None:
        """Write if it is time to."""
        if time.monotonic() >= self._due:
            self._write()

    def closed(self) -> None:
        """An epoch is closed: written now, where a write costs little."""
        if self._storage.local:
            self._write()

    def end(self, state: str, reason: str | None = None) -> None:
        """The last one: finished, failed or stopped, and why."""
        self._facts |= {"state": state, "reason": reason}
        self._vitals = dict  # the runner is gone
        self._write()

    def _write(self) -> None:
        facts = self._facts | {"time": time.time(), "last_events": self._events} | self._vitals()
        with contextlib.suppress(StorageError):  # if the records cannot be written either, that ends the run
            self._storage.write(FILE, (json.dumps(facts, indent=1) + "\n").encode())
        self._due = time.monotonic() + self._seconds


def without_passwords(text: str) -> str:
    """The text with its URLs' user names and passwords left out: for people's eyes, and for other services."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)
