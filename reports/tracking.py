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
from records.passwords import without_passwords
from records.run_folder import Records
from records.storage import Storage, StorageError
from reports.summary import interpreter

GRACE_SECONDS = 1.0  # for the mirror of a server that does not answer
POLL_SECONDS = 0.05
QUIET_SECONDS = 2.0  # that are waited without a word


def tracking_uri(config: Config, storage: Storage) -> str:
    """The server of mlflow.uri or MLFLOW_TRACKING_URI, else a SQLite file beside the run directory (for a run on an
    object store: in ./runs)."""
    folder = storage.local.parent if storage.local else Path.cwd() / "runs"
    return config.mlflow.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute()}/mlflow.db"


def upload_command(config: Config, storage: Storage) -> str:
    """What sends a run's rest. A server that its settings name is to be confirmed by the command."""
    return f"{interpreter()} -m learner.upload {storage}" + (f" --uri {config.mlflow.uri}" if config.mlflow.uri else "")


class Tracker:
    """Starts the mirror (an OSError where it cannot), tells it when there is news, and passes on what it says."""

    def __init__(self, records: Records, config: Config, say: Callable[[str], None]) -> None:
        self._records, self._config, self._say = records, config, say
        self._state = "starting"  # then ok or failing, as the mirror reports
        self._last_words = ""
        self._mlflow_run_id: str | None = None
        uri = without_passwords(tracking_uri(config, records.storage))
        look = f" (look: {interpreter()} -m mlflow ui --backend-store-uri {uri})" if uri.startswith("sqlite:") else ""
        say(f"MLflow: {uri}, experiment {config.mlflow.experiment}{look}")
        self._folder = TemporaryFolder()  # for MLflow's temporary files, should the mirror be killed
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        try:
            self._mirror = subprocess.Popen(
                # Server and experiment are in the run's config: an argument would show a password to every user.
                [sys.executable, "-m", "learner.upload", str(records.storage), "--follow"], text=True, bufsize=1,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(self._folder.path), **self._folder.mark},
                start_new_session=True,  # Ctrl-C is for the driver; the mirror ends with its input
            )  # fmt: skip
        except OSError:
            self._folder.remove()
            raise
        self._reader = threading.Thread(target=self._read, name="mlflow-mirror", daemon=True)
        self._reader.start()

    def notify(self) -> None:
        """There is a newly closed epoch. Also notes the MLflow run's id in run.json once it is known."""
        self._note()
        self._tell("sync")

    def finish(self, status: str) -> None:
        """Let the mirror send the rest, for at most mlflow.finish_seconds (a moment, if its server does not answer or a
        signal ends the run), and stop it. `status` is FINISHED, FAILED or KILLED."""
        self._tell(f"finish {status}")
        limit = GRACE_SECONDS if self._state == "failing" else self._config.mlflow.finish_seconds
        start, said = time.monotonic(), limit <= QUIET_SECONDS
        while (status_of_mirror := self._mirror.poll()) is None:
            if (waited := time.monotonic() - start) > (min(limit, GRACE_SECONDS) if signals.status(0) else limit):
                break
            if waited > QUIET_SECONDS and not said:
                said = True
                self._say(
                    f"waiting for MLflow to take the last records, for at most {limit:g} s (mlflow.finish_seconds)"
                )
            time.sleep(POLL_SECONDS)
        self._mirror.kill()
        self._reader.join(GRACE_SECONDS)
        self._folder.remove()
        with contextlib.suppress(StorageError):  # a full disk has been said already
            self._note()
        if status_of_mirror != 0:
            words = f" ({self._last_words})" if self._last_words else ""
            remedy = upload_command(self._config, self._records.storage)
            self._say(f"MLflow does not have everything{words}; send it: {remedy}")

    def _note(self) -> None:
        if self._mlflow_run_id and self._records.about.get("mlflow_run_id") != self._mlflow_run_id:
            self._records.note(mlflow_run_id=self._mlflow_run_id)

    def _tell(self, word: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # it ended: finish will say so
            print(word, file=self._mirror.stdin)

    def _read(self) -> None:
        for line in self._mirror.stdout or ():
            kind, _, text = line.strip().partition(" ")
            if kind == "state":
                self._state = text
            elif kind == "run":
                self._mlflow_run_id = text
            elif kind == "say":
                self._say(text)
            elif line.strip():
                self._last_words = line.strip()
