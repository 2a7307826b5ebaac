"""Shows a run in MLflow: `python -m learner.upload RUN` sends what is missing there of the run's durable records.

What is missing is found by asking the server, so it can be given again at any time, and be killed at any time. During
a run the driver keeps one going with --follow (learner/tracking.py), which reads "sync" and "finish STATUS" lines and
answers with "state ...", "run ID" and "say TEXT" lines. MLflow's steps count epochs (0: before training); those of
update/... count policy updates.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import queue
import signal
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

# A server that does not answer is given up on in seconds, not minutes, unless the user says otherwise.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "false")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from PIL import Image

from learner import checkpoint, report
from learner.checkpoint import CheckpointError
from learner.records import BEFORE, CONFIG, Records
from learner.resume import in_use
from learner.storage import Storage, StorageError
from learner.tracking import tracking_uri

SENTINEL = "epochs_done"  # the last metric of an epoch's batch: where it is, the others are
BATCH = 900  # metrics a request; the server takes 1000
RETRY_SECONDS = 30.0
GONE_SECONDS = 5.0  # for the last words when the driver was killed
SHEETS = "samples"


class Mirror:
    """One run, as a tracking server sees it."""

    def __init__(self, storage: Storage, uri: str, experiment: str) -> None:
        self.storage, self.uri, self.experiment = storage, uri, experiment
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        self.client = mlflow.MlflowClient(uri)
        self.run_id = ""  # MLflow's; empty before connect
        self._logged: set[int] = set()  # steps whose metrics are there

    def connect(self) -> str:
        """The MLflow run of this run, found by its tag or made; its parameters and tags. Returns its id."""
        records = Records.open(self.storage)
        about = records.about
        found = self.client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found else self._create_experiment()
        runs = self.client.search_runs([experiment], f"tags.`tributary.run_id` = '{about['run_id']}'", max_results=1)
        if runs:
            self.run_id = runs[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            tags = {"tributary.run_id": about["run_id"], "mlflow.source.name": "learner.run"}
            self.run_id = self.client.create_run(experiment, tags=tags, run_name=about["name"]).info.run_id
        config = records.config()
        environment = about.get("environment", {})
        self.client.log_batch(
            self.run_id,
            params=[Param(key, str(value)) for key, value in config.binding().items()],
            tags=[
                RunTag("tributary.config_sha256", about["config_digest"]),
                RunTag("tributary.run_directory", str(self.storage)),
                *(RunTag(f"tributary.{key}", str(value)) for key, value in environment.items() if value),
                *(
                    [RunTag("mlflow.source.git.commit", environment["git_commit"])]
                    if environment.get("git_commit")
                    else []
                ),
            ],
        )
        history = self.client.get_metric_history(self.run_id, SENTINEL)
        self._logged = {metric.step for metric in history}
        return self.run_id

    def sync(self) -> None:
        """Send what the server lacks of the closed epochs: metrics, contact sheets, adapters."""
        records = Records.open(self.storage)
        found = [self._manifest(step, records.run_id) for step in checkpoint.steps(self.storage)]
        manifests = [manifest for manifest in found if manifest]
        done = manifests[-1]["next_epoch"] if manifests else BEFORE
        for line in records.lines:
            if line["epoch"] < done and line["epoch"] + 1 not in self._logged:
                self._send_line(line)
                self._logged.add(line["epoch"] + 1)
        evaluated = [epoch for epoch in records.evaluated() if epoch < done]
        there = {file.path.rsplit("/", 1)[-1] for file in self.client.list_artifacts(self.run_id, "images")}
        for epoch in evaluated:
            if not any(
                name.startswith((f"{SHEETS}%step%{epoch + 1}%", f"{SHEETS}+step+{epoch + 1}+")) for name in there
            ):
                picture = Image.open(io.BytesIO(records.sheet(epoch)))
                self.client.log_image(self.run_id, picture, key=SHEETS, step=epoch + 1, synchronous=True)
        for manifest in manifests:  # of those that stay: of evaluated epochs, or the newest when nothing is evaluated
            if manifest["next_epoch"] - 1 in evaluated or (not evaluated and manifest is manifests[-1]):
                self._send_adapter(manifest)

    def finish(self, status: str) -> None:
        """Sync, send report and config, and close the MLflow run with FINISHED, FAILED or KILLED.

        Raises:
            StorageError: the run is finished, but not all of its epochs could be read.
        """
        self.sync()
        lines = Records.open(self.storage).lines
        if status == "FINISHED" and any(line["epoch"] + 1 not in self._logged for line in lines):
            raise StorageError(f"not every epoch of {self.storage} could be read")
        for name in (CONFIG, report.FILE):
            if self.storage.exists(name):
                self._send_files("", {name: self.storage.read(name)})
        self.client.set_terminated(self.run_id, status)

    def _create_experiment(self) -> str:
        # Without a place of its own, a local store would put artifacts into the current directory.
        local = self.uri.startswith("sqlite:///")
        folder = Path(self.uri.removeprefix("sqlite:///")).parent / "mlartifacts"
        return self.client.create_experiment(self.experiment, folder.as_uri() if local else None)

    def _send_line(self, line: dict[str, Any]) -> None:
        """An epoch in one request (if it fits), the sentinel last; the record's own times, so that sending the same
        again changes nothing."""
        time, step = int(line["time"] * 1000), line["epoch"] + 1
        skipped = ("epoch", "time", "step", "policy_version")
        metrics = []
        updates = line["updates"]
        for i, update in enumerate(updates):
            number = line["step"] - len(updates) + i + 1
            metrics += [
                Metric(f"update/{key}", value, time, number) for key, value in update.items() if value is not None
            ]
        numbers = ((key, value) for key, value in line.items() if isinstance(value, int | float) and key not in skipped)
        metrics += [Metric(key, float(value), time, step) for key, value in numbers]
        metrics.append(Metric(SENTINEL, step, time, step))
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + BATCH])

    def _manifest(self, step: int, run_id: str) -> dict[str, Any] | None:
        """Of a whole checkpoint; a torn one, or one just being pruned, has none."""
        with contextlib.suppress(CheckpointError):
            return checkpoint.manifest(self.storage, step, run_id)
        return None

    def _send_adapter(self, manifest: dict[str, Any]) -> None:
        """The LoRA of a checkpoint."""
        name = f"{checkpoint.FOLDER}/step-{manifest['step']:06d}"
        files = [file for file in manifest["files"] if file.startswith("lora/")]
        there = {file.path for file in self.client.list_artifacts(self.run_id, f"{name}/lora")}
        missing = [file for file in files if f"{name}/{file}" not in there]
        if missing:
            self._send_files(f"{name}/lora", {Path(f).name: self.storage.read(f"{name}/{f}") for f in missing})

    def _send_files(self, folder: str, files: dict[str, bytes]) -> None:
        with tempfile.TemporaryDirectory() as aside:
            for name, content in files.items():
                (Path(aside) / name).write_bytes(content)
            self.client.log_artifacts(self.run_id, aside, folder or None)


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
                mirror.finish(word.split()[1])
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


def tell(line: str) -> None:
    print(line, flush=True)


def reason(error: Exception) -> str:
    """Type and first line: MLflow's own messages hold whole HTML pages."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {textwrap.shorten(text, 200, placeholder=' ...')}"


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: MLflow has everything; 1: it does not answer; 2: no such run."""
    parser = argparse.ArgumentParser(
        prog="python -m learner.upload", description="Send to MLflow what it lacks of a run."
    )
    parser.add_argument("run", help="run directory or URL")
    parser.add_argument("--uri", help="tracking server (default: the run's mlflow.uri, MLFLOW_TRACKING_URI, or sqlite)")
    parser.add_argument("--experiment", help="MLflow experiment (default: the run's)")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.CRITICAL)
    try:
        storage = Storage(args.run)
        records = Records.open(storage)
        config = records.config()
    except (OSError, ValueError) as error:
        print(f"learner.upload: {args.run} is no run of Tributary: {error}", file=sys.stderr)
        return 2
    uri = args.uri or tracking_uri(config, storage)
    try:
        mirror = Mirror(storage, uri, args.experiment or config.mlflow.experiment)
        if args.follow:
            return follow(mirror)
        mirror.connect()
        if in_use(storage):
            mirror.sync()
            print(f"MLflow at {uri} has all closed epochs of {storage}, which is still going on (run {mirror.run_id})")
            return 0
        mirror.finish("FINISHED" if records.about["finished"] else "KILLED")
    except Exception as error:
        if args.follow:
            tell(f"say warning: MLflow at {uri} cannot be used ({reason(error)}); the run goes on without it")
            return 1
        print(
            f"learner.upload: MLflow at {uri} fails ({reason(error)}); nothing is lost, give it again", file=sys.stderr
        )
        return 1
    print(f"MLflow at {uri} has everything of {storage} (run {mirror.run_id})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
