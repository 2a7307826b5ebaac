"""Shows a run in MLflow: `python -m learner.upload RUN` sends what is missing there of the run's durable records.

What is missing is found by asking the server, so it can be given again at any time, and be killed at any time. During
a run the driver keeps one going with --follow (reports/tracking.py), which reads "sync" and "finish STATUS" lines and
answers with "state ...", "run ID" and "say TEXT" lines. What is sent: reports/mlflow_mirror.py;
models: reports/mlflow_registry.py.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import signal
import sys
import textwrap
import threading
import time

# A server that does not answer is given up on in seconds, not minutes, unless the user says otherwise.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from learner.config import saved_config
from records.checkpoint import CheckpointError
from records.lock import in_use
from records.run_folder import Records
from records.storage import Storage, StorageError
from reports.mlflow_mirror import Mirror
from reports.mlflow_registry import NoModel, Registry
from reports.tracking import tracking_uri

RETRY_SECONDS = 30.0
GONE_SECONDS = 5.0  # for the last words when the driver was killed


def follow(mirror: Mirror) -> int:
    """Obey the driver's lines until it finishes or is gone. Exit status 0: MLflow has everything."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `ray job stop` sends it to all: the driver says when we end
    words: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            words.put(line.strip())
        words.put("gone")
        time.sleep(GONE_SECONDS)  # a server that does not answer keeps nobody alive
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    monitor: SystemMetricsMonitor | None = None
    warned = connected = False
    word = "sync"
    while True:
        try:
            if not connected:
                tell(f"run {mirror.connect()}")
                connected = True
            if monitor is None:  # system metrics, from a thread of MLflow's own
                monitor = SystemMetricsMonitor(mirror.run_id, resume_logging=True, tracking_uri=mirror.uri)
                monitor.start()
            if word == "gone":  # the driver was killed; unless another one has taken the run over
                if not in_use(mirror.storage):
                    mirror.client.set_terminated(mirror.run_id, "KILLED")
                return 1
            if word.startswith("finish"):
                monitor.finish()
                status = word.split()[1]
                mirror.finish(status)
                if status == "FINISHED":  # others may go on
                    follow_models(mirror)
                return 0
            mirror.sync()
            tell("state ok")
            if warned:
                warned = False
                tell("say MLflow answers again; what it missed is there now")
        except (StorageError, CheckpointError) as error:  # just being pruned or written: the next round will do
            print(reason(error), flush=True)
            if word == "gone" or word.startswith("finish"):
                return 1
        except Exception as error:  # requests', mlflow's, SQL's: whatever it is, the run goes on
            tell("state failing")
            with contextlib.suppress(Exception):
                if monitor is not None:
                    monitor.finish()
            monitor = None
            if not warned:
                warned = True
                tell(
                    f"say warning: MLflow at {mirror.uri} fails ({reason(error)}); the run goes on, its records are in "
                    f"{mirror.storage}"
                )
            if word == "gone" or word.startswith("finish"):
                print(reason(error), flush=True)
                return 1
        try:
            word = words.get(timeout=RETRY_SECONDS)
            while word == "sync":
                word = words.get_nowait()
        except queue.Empty:
            word = "sync"


def follow_models(mirror: Mirror) -> None:
    """Models are an extra: without them the run is there all the same."""
    try:
        send_models(mirror, saved_config(Records.open(mirror.storage)).mlflow.registered_model)
    except NoModel as error:
        tell(f"say {error}")
    except Exception as error:
        again = f"python -m learner.upload {mirror.storage}"
        tell(f"say warning: MLflow did not take the run's model ({reason(error)}); send it: {again}")


def send_models(mirror: Mirror, name: str | None) -> Registry:
    """The last checkpoint's model and that of the last evaluated one, often the same; as versions of the registered
    model `name`, if there is one.

    Raises:
        NoModel: there is none of this run.
        Exception: what MLflow and the storage raise.
    """
    records = Records.open(mirror.storage)
    registry = Registry(mirror.client, mirror.experiment_id, mirror.run_id, records)
    manifests, evaluated = mirror.manifests(records.run_id), records.evaluated()
    judged = [manifest for manifest in manifests if manifest["next_epoch"] - 1 in evaluated]
    for manifest in {each["step"]: each for each in judged[-1:] + manifests[-1:]}.values():
        model = registry.log(manifest)
        if name is not None:
            registry.register(name, manifest, model)
    return registry


def tell(line: str) -> None:
    print(line, flush=True)


def reason(error: Exception) -> str:
    """Type and first line: MLflow's own messages hold whole HTML pages."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {textwrap.shorten(text, 200, placeholder=' ...')}"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: MLflow has everything; 1: it does not answer; 2: no such run, or nothing to promote."""
    parser = argparse.ArgumentParser(
        prog="python -m learner.upload", description="Send to MLflow what it lacks of a run."
    )
    parser.add_argument("run", help="run directory or URL")
    parser.add_argument("--uri", help="tracking server (default: the run's mlflow.uri, MLFLOW_TRACKING_URI, or sqlite)")
    parser.add_argument("--experiment", help="MLflow experiment (default: the run's)")
    parser.add_argument("--registered-model", metavar="NAME", help="register the LoRA under it (default: the run's)")
    parser.add_argument("--promote", action="store_true", help="then make it the registered model's champion")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.CRITICAL)
    try:
        storage = Storage(args.run)
        records = Records.open(storage)
        config = saved_config(records)
    except (OSError, ValueError) as error:
        complain(f"{args.run} is no run of Tributary: {error}")
        return 2
    uri = args.uri or tracking_uri(config, storage)
    name = args.registered_model or config.mlflow.registered_model
    if args.promote and name is None:
        complain("--promote: say which registered model, with --registered-model NAME (mlflow.registered_model)")
        return 2
    try:
        mirror = Mirror(storage, uri, args.experiment or config.mlflow.experiment)
        if args.follow:
            return follow(mirror)
        mirror.connect()
        if in_use(storage):
            mirror.sync()
            print(f"MLflow at {uri} has all closed epochs of {storage}, which is still going on (run {mirror.run_id})")
            if args.promote:
                complain("--promote: the run is still going on")
            return 2 if args.promote else 0
        mirror.finish("FINISHED" if records.about["finished"] else "KILLED")
        registry = send_models(mirror, name)
        if args.promote and name is not None:
            version = registry.promote(name).version
            print(f"{name} version {version} is its champion (models:/{name}@champion)")
    except NoModel as error:
        complain(str(error))
        if args.promote:
            return 2
    except Exception as error:
        if args.follow:
            tell(f"say warning: MLflow at {uri} cannot be used ({reason(error)}); the run goes on without it")
            return 1
        complain(f"MLflow at {uri} fails ({reason(error)}); nothing is lost, give it again")
        return 1
    print(f"MLflow at {uri} has everything of {storage} (run {mirror.run_id})")
    return 0


def complain(text: str) -> None:
    print(f"learner.upload: {text}", file=sys.stderr)
