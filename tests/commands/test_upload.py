"""MLflow as a view of the run's records: complete, without repeats, and never in the way."""

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import mlflow.diffusers
import pytest

from commands import upload
from learner.inprocess import InProcessRunner
from learner.run import main
from records.run_folder import Records
from records.storage import Storage
from reports.tracking import Tracker


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def settings(small_settings):
    return [
        *small_settings,
        "run.runner=inprocess",
        "train.epochs=3",
        "evaluation.every=2",
        "train.updates_per_epoch=2",
    ]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


def wait_for_metrics(database, *names: str) -> None:
    """Until the mirror, in its process, has sent them. Not asked by MLflow, which would make the tables meanwhile."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as opened,
        ):
            if set(names) <= {row[0] for row in opened.execute("select distinct key from metrics")}:
                return
        time.sleep(0.3)
    raise AssertionError(f"{names} never reached MLflow")


def only_run(uri: str):
    client = mlflow.MlflowClient(uri)
    found = client.search_runs(
        [client.get_experiment_by_name("tributary").experiment_id], "tags.tributary.run_id != ''"
    )
    (run,) = found
    return client, run


def assert_complete(uri: str, folder, epochs: int = 3) -> None:
    """Everything of the run's records is there, once."""
    client, run = only_run(uri)
    records = Records.open(Storage(str(folder)))
    assert run.data.tags["tributary.run_id"] == records.run_id
    for key in run.data.metrics:
        steps = Counter(metric.step for metric in client.get_metric_history(run.info.run_id, key))
        assert max(steps.values()) == 1, f"{key} is logged twice at a step"
    losses = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert losses == {line["epoch"] + 1: line["loss"] for line in records.lines if line["epoch"] >= 0}
    updates = client.get_metric_history(run.info.run_id, "update/loss")
    assert [metric.step for metric in updates] == list(range(1, 2 * epochs + 1))
    names = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    steps = sorted(int(name.split("step+")[1].split("+")[0]) for name in (path.replace("%", "+") for path in names))
    assert steps == [epoch + 1 for epoch in records.evaluated()]
    top = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"checkpoints", "images", "config.yaml", "report.html"} <= top
    adapters = {file.path for file in client.list_artifacts(run.info.run_id, f"checkpoints/step-{2 * epochs:06d}/lora")}
    assert {path.rsplit("/", 1)[1] for path in adapters} == {"kohya.safetensors", "pytorch_lora_weights.safetensors"}
    assert run.data.params["lora.rank"] == "2" and run.info.status == "FINISHED"


def test_a_run_is_shown_whole_and_keeps_its_id_through_a_resume(settings, tmp_path, monkeypatch):
    real = InProcessRunner.train_epoch

    def dies_in_epoch_1(self, epoch, *rest):
        if epoch == 1:
            wait_for_metrics(tmp_path / "mlflow.db", "loss", "system/cpu_utilization_percentage")
            raise Killed
        return real(self, epoch, *rest)

    arguments = [*settings, "mlflow.enabled=true", f"run.dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patched:
        patched.setattr(InProcessRunner, "train_epoch", dies_in_epoch_1)
        with pytest.raises(Killed):
            main(arguments)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = only_run(uri)[1]
    assert run.info.status == "FAILED" and "loss" in run.data.metrics
    assert main(arguments) == 0
    assert_complete(uri, tmp_path / "run")
    again = only_run(uri)[1]
    assert again.info.run_id == run.info.run_id == Records.open(Storage(str(tmp_path / "run"))).about["mlflow_run_id"]
    assert "tributary.git_commit" in again.data.tags and again.data.tags["tributary.config_sha256"]
    assert "system/cpu_utilization_percentage" in again.data.metrics
    assert not (tmp_path / "mlruns").exists() and (tmp_path / "mlartifacts").exists()


def test_upload_sends_what_is_missing_and_nothing_twice(settings, tmp_path, capsys):
    assert main([*settings, f"run.dir={tmp_path / 'run'}"]) == 0
    uri = f"sqlite:///{tmp_path}/elsewhere.db"
    for _ in range(2):
        assert upload.main([str(tmp_path / "run"), "--uri", uri]) == 0
        assert_complete(uri, tmp_path / "run")
    assert "has everything" in capsys.readouterr().out
    assert upload.main([str(tmp_path / "nothing")]) == 2


def test_upload_passes_over_a_torn_checkpoint(settings, tmp_path):
    assert main([*settings, f"run.dir={tmp_path / 'run'}"]) == 0
    (tmp_path / "run/checkpoints/step-000004/state.json").unlink()
    assert upload.main([str(tmp_path / "run")]) == 0
    assert_complete(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run")


def test_upload_says_when_not_everything_could_be_read(settings, tmp_path, capsys):
    assert main([*settings, f"run.dir={tmp_path / 'run'}"]) == 0
    for step in (4, 6):
        (tmp_path / f"run/checkpoints/step-{step:06d}/state.json").unlink()
    assert upload.main([str(tmp_path / "run")]) == 1
    assert "not every epoch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "uri", [pytest.param("foo://nowhere", marks=pytest.mark.slow), "sqlite:////proc/nope/mlflow.db"]
)
def test_an_unusable_server_costs_a_warning_only(uri, settings, tmp_path, capfd):
    assert main([*settings, "mlflow.enabled=true", f"mlflow.uri={uri}", f"run.dir={tmp_path / 'run'}"]) == 0
    said = capfd.readouterr()
    assert said.out.count("warning: MLflow") == 1 and "Traceback" not in said.out + said.err
    assert upload.main([str(tmp_path / "run"), "--uri", uri]) == 1


@pytest.mark.slow
def test_retries_leave_no_threads_and_no_doubles(settings, tmp_path, monkeypatch):
    """A store whose metrics work and whose artifacts do not: every sync fails."""
    assert main([*settings, f"run.dir={tmp_path / 'run'}"]) == 0
    (tmp_path / "mlartifacts").write_text("a file, where a folder should be")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mirror = upload.Mirror(Storage(str(tmp_path / "run")), uri, "tributary")
    told, words = [], iter(["sync", "sync", "sync", "gone"])
    monkeypatch.setattr(upload, "tell", told.append)
    monkeypatch.setattr(upload.signal, "signal", lambda *_: None)  # only a main thread may
    monkeypatch.setattr(upload, "GONE_SECONDS", 3600)  # then it ends its process: here, the tests'
    monkeypatch.setattr(upload, "RETRY_SECONDS", 1.5)
    ours, theirs = os.pipe()
    monkeypatch.setattr("sys.stdin", os.fdopen(ours))
    with os.fdopen(theirs, "w", buffering=1) as driver:
        follower = threading.Thread(target=upload.follow, args=[mirror])
        follower.start()
        for _ in words:
            driver.write("sync\n")
            time.sleep(2)
    follower.join(20)
    assert not follower.is_alive() and told.count("state failing") >= 3
    deadline = time.monotonic() + 10  # the last one ends by itself: its run is over
    while any("SystemMetrics" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    client, run = only_run(uri)
    for key in run.data.metrics:
        steps = Counter(metric.step for metric in client.get_metric_history(run.info.run_id, key))
        assert max(steps.values()) == 1, key


@pytest.fixture
def black_hole():
    """A server that accepts and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    kept = []

    def accept():
        while True:
            try:
                kept.append(server.accept()[0])
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()
    for connection in kept:
        connection.close()


@pytest.mark.slow
def test_a_server_that_never_answers_costs_a_warning(settings, tmp_path, black_hole, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", black_hole)
    real = InProcessRunner.train_epoch

    def slower(self, *arguments):
        time.sleep(4)  # a run longer than the mirror's start, so that the silence is met on the way
        return real(self, *arguments)

    monkeypatch.setattr(InProcessRunner, "train_epoch", slower)
    waited = time_of_finish(monkeypatch)
    assert main([*settings, "mlflow.enabled=true", f"run.dir={tmp_path / 'run'}"]) == 0
    said = capfd.readouterr().out
    assert said.count("warning: MLflow") == 1 and f"python -m learner.upload {tmp_path / 'run'}" in said
    assert waited[0] < 3
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert upload.main([str(tmp_path / "run")]) == 0
    assert_complete(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run")


def time_of_finish(monkeypatch) -> list[float]:
    """Seconds that the driver waits for the mirror at its end, once it has."""
    real, seconds = Tracker.finish, []

    def timed(self, status):
        start = time.perf_counter()
        real(self, status)
        seconds.append(time.perf_counter() - start)

    monkeypatch.setattr(Tracker, "finish", timed)
    return seconds


def serve(folder, port: int) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/kept",
    ]  # fmt: skip
    log = (folder / "server.log").open("a")
    server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + 120
    while True:
        try:
            first = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
            urllib.request.urlopen(first, timeout=60).close()  # it is the slowest
            return server
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()[-2000:]
            time.sleep(0.2)


@pytest.mark.slow
def test_a_server_killed_on_the_way_gets_the_rest_later(settings, tmp_path, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    server = serve(tmp_path, port)
    real = InProcessRunner.train_epoch

    def server_dies_in_epoch_1(self, epoch, *rest):
        if epoch == 1:
            deadline = time.monotonic() + 200
            client = mlflow.MlflowClient(uri)
            while time.monotonic() < deadline:  # the witness: epoch 0 was there
                found = client.get_experiment_by_name("tributary")
                runs = client.search_runs([found.experiment_id]) if found else []
                if any("loss" in run.data.metrics for run in runs):
                    break
                time.sleep(0.5)
            else:
                raise AssertionError("epoch 0 never reached the server")
            os.killpg(server.pid, signal.SIGKILL)
        if epoch == 2:
            time.sleep(6)
        return real(self, epoch, *rest)

    monkeypatch.setattr(InProcessRunner, "train_epoch", server_dies_in_epoch_1)
    try:
        named = ["mlflow.registered_model=shapes", "mlflow.group=sweep"]
        assert main([*settings, *named, "mlflow.enabled=true", f"run.dir={tmp_path / 'run'}"]) == 0
        said = capfd.readouterr().out
        assert said.count("warning: MLflow") == 1 and "python -m learner.upload" in said
        assert [line["epoch"] for line in Records.open(Storage(str(tmp_path / "run"))).lines] == [-1, 0, 1, 2]
        assert upload.main([str(tmp_path / "run")]) == 1
        server = serve(tmp_path, port)
        for _ in range(2):
            assert upload.main([str(tmp_path / "run"), "--promote"]) == 0
            assert_complete(uri, tmp_path / "run")
        assert mlflow.MlflowClient(uri).get_registered_model("shapes").aliases == {"candidate": "1", "champion": "1"}
        adapter = mlflow.diffusers.load_model("models:/shapes@champion").adapter_path
        assert [file.suffix for file in Path(adapter).iterdir()] == [".safetensors"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
