"""The driver's side of MLflow: a process of its own that mirrors the run's records (commands/upload.py --follow).

It is told when an epoch is closed and never waited for, so a slow, dead or silent server costs the run nothing; at the
end it gets a moment to catch up. The driver itself never imports mlflow.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cluster import signals
from cluster.temp_folders import TemporaryFolder
from learner.config import ROOT, Config
from records.heartbeat import without_passwords
from records.run_folder import Records
from records.storage import Storage, StorageError

GRACE_SECONDS = 1.0  # for the mirror of a server that does not answer
POLL_SECONDS = 0.05


def tracking_uri(config: Config, storage: Storage) -> str:
    """The server of mlflow.uri or MLFLOW_TRACKING_URI, else a SQLite file beside the run directory (for a run on an
    object store: in ./runs)."""
    if config.mlflow.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return config.mlflow.uri or os.environ["MLFLOW_TRACKING_URI"]
    folder = storage.local.parent if storage.local else Path.cwd() / "runs"
    return f"sqlite:///{folder.absolute()}/mlflow.db"


class Tracker:
    """Starts the mirror, tells it when there is news, and passes on what it says."""

    def __init__(self, records: Records, config: Config, say: Callable[[str], None]) -> None:
        self._records, self._config, self._say = records, config, say
        self._state = "starting"  # then ok or failing, as the mirror reports
        self._last_words = ""
        self._mlflow_run_id: str | None = None
        self._mirror: subprocess.Popen[str] | None = None
        if not config.mlflow.enabled:
            return
        uri = without_passwords(tracking_uri(config, records.storage))
        look = f" (look: mlflow ui --backend-store-uri {uri})" if uri.startswith("sqlite:") else ""
        say(f"MLflow: {uri}, experiment {config.mlflow.experiment}{look}")
        self._folder = TemporaryFolder()  # for MLflow's temporary files, should the mirror be killed
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        try:
            self._mirror = subprocess.Popen(
                # Server and experiment are in the run's config: an argument would show a password to every user.
                [sys.executable, "-m", "learner.upload", str(records.storage), "--follow"], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(self._folder.path), **self._folder.mark},
                start_new_session=True,  # Ctrl-C is for the driver; the mirror ends with its input
            )  # fmt: skip
        except OSError as error:
            self._folder.remove()
            say(f"warning: no MLflow, its process cannot be started: {error}")
            return
        self._reader = threading.Thread(target=self._read, name="mlflow-mirror", daemon=True)
        self._reader.start()

    def notify(self) -> None:
        """There is a newly closed epoch. Also notes the MLflow run's id in run.json once it is known."""
        self._note()
        self._tell("sync")

    def finish(self, status: str) -> None:
        """Let the mirror send the rest, for at most mlflow.finish_seconds (a moment, if its server does not answer or a
        signal ends the run), and stop it. `status` is FINISHED, FAILED or KILLED. Safe to call twice."""
        if self._mirror is None:
            return
        self._tell(f"finish {status}")
        complete = self._wait() == 0
        self._mirror.kill()
        self._reader.join(GRACE_SECONDS)
        self._folder.remove()
        self._mirror = None
        with contextlib.suppress(StorageError):  # a full disk has been said already
            self._note()
        if not complete:
            words = f" ({self._last_words})" if self._last_words else ""
            self._say(
                f"MLflow does not have everything{words}; send it: python -m learner.upload {self._records.storage}"
            )

    def _wait(self) -> int | None:
        """The mirror's exit status, or None if it does not end in time."""
        assert self._mirror is not None
        start = time.monotonic()
        limit = GRACE_SECONDS if self._state == "failing" else self._config.mlflow.finish_seconds
        while (status := self._mirror.poll()) is None:
            if time.monotonic() - start > (min(limit, GRACE_SECONDS) if signals.hurry() else limit):
                return None
            time.sleep(POLL_SECONDS)
        return status

    def _note(self) -> None:
        if self._mlflow_run_id and self._records.about.get("mlflow_run_id") != self._mlflow_run_id:
            self._records.note(mlflow_run_id=self._mlflow_run_id)

    def _tell(self, word: str) -> None:
        if self._mirror is not None and self._mirror.stdin is not None:
            with contextlib.suppress(OSError, ValueError):  # it ended: finish will say so
                self._mirror.stdin.write(f"{word}\n")
                self._mirror.stdin.flush()

    def _read(self) -> None:
        assert self._mirror is not None and self._mirror.stdout is not None
        for line in self._mirror.stdout:
            kind, _, text = line.strip().partition(" ")
            if kind == "state":
                self._state = text
            elif kind == "run":
                self._mlflow_run_id = text
            elif kind == "say":
                self._say(text)
            elif line.strip():
                self._last_words = line.strip()
