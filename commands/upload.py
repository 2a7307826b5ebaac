"""Shows a run in MLflow: `python -m learner.upload RUN` sends what is missing there of the run's durable records.

What is missing is found by asking the server, so it can be given again at any time, and be killed at any time. During
a run the driver keeps one going with --follow (reports/tracking.py), which reads "sync" and "finish STATUS" lines and
answers with "state ...", "run ID" and "say TEXT" lines. What is sent: reports/mlflow_mirror.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import logging
import os
import queue
import signal
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING

from commands.outcome import complain
from learner.config import Config, saved_config
from records.checkpoint import CheckpointError
from records.heartbeat import without_passwords
from records.run_folder import Records
from records.storage import Storage, StorageError
from reports.summary import interpreter
from reports.tracking import tracking_uri

if TYPE_CHECKING:
    from reports.mlflow_mirror import Mirror

DEFAULTS = {
    # A server that does not answer is given up on in seconds, not minutes, unless the user says otherwise.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}  # fmt: skip
RETRY_SECONDS = 30.0
GONE_SECONDS = 5.0  # for the last words when the driver was killed
tell = functools.partial(print, flush=True)


def follow(mirror: Mirror) -> int:
    """Obey the driver's lines until it finishes or is gone. Exit status 0: MLflow has everything."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `ray job stop` sends it to all: the driver says when we end
    words: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=[words], daemon=True).start()
    monitor: SystemMetricsMonitor | None = None  # of the system metrics, in a thread of MLflow's own
    warned, word = False, "sync"
    while True:
        try:
            if monitor is None:
                tell(f"run {mirror.connect()}")
                monitor = SystemMetricsMonitor(mirror.run_id, resume_logging=True, tracking_uri=mirror.uri)
                monitor.start()
            if word == "gone":  # the driver was killed; unless another one has taken the run over
                if not mirror.storage.in_use():
                    mirror.client.set_terminated(mirror.run_id, "KILLED")
                return 1
            if word.startswith("finish"):
                monitor.finish()
                status = word.split()[1]
                mirror.finish(status)
                if status == "FINISHED":  # others may go on
                    _send_model(mirror)
                return 0
            mirror.sync()
            tell("state ok")
            if warned:
                warned = False
                tell("say MLflow answers again; what it missed is there now")
            importlib.import_module("peft")  # log_model will: its seconds pass now, not while the driver waits
        except Exception as error:  # requests', mlflow's, SQL's: whatever it is, the run goes on
            print(reason(error), flush=True)
            if not isinstance(error, StorageError | CheckpointError):  # a file being written or pruned: the next round
                tell("state failing")
                with contextlib.suppress(Exception):
                    if monitor is not None:
                        monitor.finish()
                monitor = None  # connects again
                if not warned:
                    warned = True
                    tell(f"say warning: MLflow at {without_passwords(mirror.uri)} fails ({reason(error)}); the run "
                         f"goes on, its records are in {mirror.storage}")  # fmt: skip
        if word != "sync":
            return 1
        word = "sync"
        with contextlib.suppress(queue.Empty):
            word = words.get(timeout=RETRY_SECONDS)
            while word == "sync":
                word = words.get_nowait()


def _read(words: queue.Queue[str]) -> None:
    """The driver's lines."""
    for line in sys.stdin:
        words.put(line.strip())
    words.put("gone")
    time.sleep(GONE_SECONDS)  # a server that does not answer keeps nobody alive
    os._exit(1)


def _send_model(mirror: Mirror) -> None:
    """A model is an extra: without it the run is there all the same."""
    try:
        if lack := mirror.send_model(saved_config(Records.open(mirror.storage)).mlflow.registered_model):
            tell(f"say no model in MLflow: {lack}")
    except Exception as error:
        again = f"{interpreter()} -m learner.upload {mirror.storage}"
        tell(f"say warning: MLflow did not take the run's model ({reason(error)}); send it: {again}")


def reason(error: Exception) -> str:
    """Type and first line: MLflow's own messages hold whole HTML pages, and its server's address."""
    text = (without_passwords(str(error)).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {textwrap.shorten(text, 200, placeholder=' ...')}"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: MLflow has everything; 1: it does not answer; 2: no such run, or its server must be confirmed."""
    parser = argparse.ArgumentParser("python -m learner.upload", description="Send to MLflow what it lacks of a run.")
    parser.add_argument("run", help="run directory or URL")
    parser.add_argument("--uri", help="tracking server (default: the run's mlflow.uri, MLFLOW_TRACKING_URI, or sqlite)")
    parser.add_argument("--experiment", help="MLflow experiment (default: the run's)")
    parser.add_argument("--registered-model", metavar="NAME", help="register the LoRA under it (default: the run's)")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    try:
        storage = Storage(args.run)
        records = Records.open(storage)
        config = saved_config(records)
    except (OSError, ValueError) as error:
        complain("upload", f"{args.run} is no run of Tributary: {error}")
        return 2
    uri = args.uri or tracking_uri(config, storage)
    server = without_passwords(uri)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    from reports.mlflow_mirror import Mirror

    for package in ("mlflow", "alembic"):  # after mlflow's import, which sets its own level
        logging.getLogger(package).setLevel(logging.CRITICAL)
    if not args.uri and not args.follow and _would_send_credentials(config):
        text = f"your MLflow user, password or token would be sent to {server}, which the run's own settings name"
        complain("upload", f"{text}: if that is right, give it as --uri")
        return 2
    try:
        mirror = Mirror(storage, uri, args.experiment or config.mlflow.experiment)
        if args.follow:
            return follow(mirror)
        mirror.connect()
        if storage.in_use():
            mirror.sync()
            print(f"MLflow at {server} has all closed epochs of {storage}, still going on (run {mirror.run_id})")
            return 0
        mirror.finish("FINISHED" if records.about["finished"] else "KILLED")
        if lack := mirror.send_model(args.registered_model or config.mlflow.registered_model):
            complain("upload", f"no model in MLflow: {lack}")
    except Exception as error:
        if args.follow:
            tell(f"say warning: MLflow at {server} cannot be used ({reason(error)}); the run goes on without it")
        else:
            complain("upload", f"MLflow at {server} fails ({reason(error)}); nothing is lost, give it again")
        return 1
    print(f"MLflow at {server} has everything of {storage} (run {mirror.run_id})")
    return 0


def _would_send_credentials(config: Config) -> bool:
    """To a server that only the run's own file names, which may be somebody else's."""
    from mlflow.utils.credentials import read_mlflow_creds

    if config.mlflow.uri is None or config.mlflow.uri == os.environ.get("MLFLOW_TRACKING_URI"):
        return False
    known = any((*read_mlflow_creds(), os.environ.get("MLFLOW_TRACKING_TOKEN")))
    return known and config.mlflow.uri.startswith(("http:", "https:"))
