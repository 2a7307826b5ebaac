"""MLflow as a view of the run's records: complete, without repeats, and never in the way."""

import contextlib
import os
import re
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
from unittest.mock import Mock

import mlflow.diffusers
import pytest
from test_mlflow_mirror import assert_whole
from test_open_run import Killed

from commands import upload
from learner.config import saved_config
from learner.inprocess import InProcessRunner
from learner.run import main
from records.run_folder import Records
from records.storage import Storage
from reports import tracking
from reports.mlflow_mirror import Mirror
from reports.summary import interpreter
from reports.tracking import Tracker


@pytest.fixture(scope="module")
def settings(small_settings):
    epochs = ["train.epochs=3", "evaluation.every=2", "train.updates_per_epoch=2"]
    return [*small_settings, *epochs, "run.runner=inprocess"]


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
    experiment = client.get_experiment_by_name("tributary").experiment_id
    (run,) = client.search_runs([experiment], "tags.tributary.run_id != ''")
    return client, run


def assert_complete(uri: str, folder, name: str | None = None) -> None:
    info, mirror = only_run(uri)[1].info, Mirror(Storage(str(folder)), uri, "tributary")
    mirror.connect()
    assert info.status == "FINISHED" and mirror.run_id == info.run_id
    assert_whole(mirror, name)


@pytest.mark.long
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


def test_upload_passes_over_a_torn_checkpoint(run, capsys):
    uri = f"sqlite:///{run.parent}/elsewhere.db"
    (run / "checkpoints/step-000001/state.json").unlink()
    assert upload.main([str(run), "--uri", uri]) == 0
    assert_complete(uri, run)
    assert f"MLflow at {uri} has everything" in capsys.readouterr().out
    (run / "checkpoints/step-000002/state.json").unlink()
    assert upload.main([str(run)]) == 1
    assert f"checkpoints in {run} are missing or damaged" in capsys.readouterr().err


def test_nothing_is_sent_to_a_server_that_only_the_run_names(run, monkeypatch, capsys):
    """Whatever is to be sent: a password, a token, or the run. The command's, then the environment's, win over it."""
    config, server = run / "config.yaml", "http://127.0.0.1:9"
    for theirs in (server, "postgresql://127.0.0.1:9/mlflow", f"sqlite:///{run.parent}/theirs.db"):
        Records.open(Storage(str(run))).save_settings(re.sub("uri: .*", f"uri: {theirs}", config.read_text()).encode())
        assert upload.main([str(run)]) == 2
        assert f"only the run's own settings name its server {theirs}: if it is yours" in capsys.readouterr().err
    assert not (run.parent / "theirs.db").exists()
    asked = []
    monkeypatch.setattr("reports.mlflow_mirror.Mirror", lambda storage, uri, experiment, warn: asked.append(uri))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mine")
    assert upload.main([str(run)]) == upload.main([str(run), "--uri", server]) == 1 and asked == ["http://mine", server]


def test_an_older_runs_password_is_read_by_nobody(run, capsys):
    config = run / "config.yaml"
    written = config.read_text().replace("uri: null", "uri: https://me:open-sesame@127.0.0.1:9/x")
    Records.open(Storage(str(run))).save_settings(written.encode())
    assert saved_config(Records.open(Storage(str(run)))).mlflow.uri == "https://127.0.0.1:9/x"
    assert upload.main([str(run)]) == 2 and "open-sesame" not in capsys.readouterr().err


@pytest.mark.long
def test_artifacts_of_a_database_that_came_with_a_run_stay_beside_it(run, tmp_path, capsys):
    """It names somebody's folder, and a link leads there."""
    mine = tmp_path.parent / "mine"
    mine.mkdir()
    mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").create_experiment("tributary", mine.as_uri())
    (tmp_path / "mlartifacts").symlink_to(mine)
    for more in ([], ["--experiment", "other"]):
        assert upload.main([str(run), *more]) == 1
        assert "name another --experiment: its artifacts would go to" in capsys.readouterr().err
    assert not any(mine.iterdir())


@pytest.fixture
def tracked(run):
    records, said = Records.open(Storage(str(run))), []
    config = saved_config(records)
    config = config.model_copy(update={"mlflow": config.mlflow.model_copy(update={"enabled": True})})
    return Tracker(records, config, said.append), said


@pytest.mark.long
def test_a_mirror_that_was_killed_is_no_fault_of_the_run(run, tracked):
    tracker, said = tracked
    wait_for_metrics(run.parent / "mlflow.db", "loss")
    tracker._mirror.kill()
    tracker.notify()
    tracker.finish("FINISHED")
    assert said[1:] == [f"MLflow does not have everything; send it: {interpreter()} -m learner.upload {run}"]
    assert Records.open(Storage(str(run))).about["mlflow_run_id"]
    uri = f"sqlite:///{run.parent}/mlflow.db"
    assert only_run(uri)[1].info.status == "RUNNING" and upload.main([str(run)]) == 0
    assert_complete(uri, run)


@pytest.fixture
def black_hole(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # its system accepts for it
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


@pytest.mark.long
def test_a_server_that_never_answers_costs_a_warning_and_a_moment(run, black_hole, tracked):
    tracker, said = tracked
    deadline = time.monotonic() + 200
    while tracker._state != "failing":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    start = time.monotonic()
    tracker.finish("FINISHED")
    assert time.monotonic() - start < 20  # and not mlflow.finish_seconds
    assert sum(text.startswith("warning: MLflow") for text in said) == 1 and f"learner.upload {run}" in said[-1]


def test_what_is_waited_for_at_the_end_is_said_with_its_limit(run, monkeypatch):
    never = Mock(stdout=[], poll=Mock(return_value=None))
    monkeypatch.setattr(tracking.subprocess, "Popen", Mock(return_value=never))
    monkeypatch.setattr(tracking, "QUIET_SECONDS", 0.0)
    records, said = Records.open(Storage(str(run))), []
    config = saved_config(records)
    mlflow = config.mlflow.model_copy(update={"finish_seconds": 0.1})
    Tracker(records, config.model_copy(update={"mlflow": mlflow}), said.append).finish("FAILED")
    assert f"(look: {interpreter()} -m mlflow ui --backend-store-uri sqlite:" in said[0]
    assert said[1] == "waiting for MLflow to take the last records, for at most 0.1 s (mlflow.finish_seconds)"
    assert len(said) == 3 and never.kill.called


def gone_after(monkeypatch, seconds: float) -> None:
    """upload.follow, called in this process, is told then that its driver is gone."""
    monkeypatch.setattr(upload.signal, "signal", lambda *_: None)
    monkeypatch.setattr(upload, "_read", lambda words: (time.sleep(seconds), words.put("gone")))


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://me:open-sesame@127.0.0.1:9", "warning: MLflow at http://127.0.0.1:9 fails"),
        ("foo://nowhere", "warning: MLflow at foo://nowhere cannot be used"),
        ("sqlite:////proc/nope/mlflow.db", "warning: MLflow at sqlite:////proc/nope/mlflow.db "),
    ],
)
def test_a_server_that_fails_is_said_once_and_its_password_never(uri, words, run, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    gone_after(monkeypatch, 0)
    assert upload.main([str(run), "--follow"]) == 1
    mirror, said, process = capsys.readouterr().out, [], Mock(side_effect=OSError("no processes left"))
    assert mirror.count(words) == 1 and "open-sesame" not in mirror and "Traceback" not in mirror
    monkeypatch.setattr(tracking.subprocess, "Popen", process)
    records = Records.open(Storage(str(run)))
    with pytest.raises(OSError, match="no processes left"):
        Tracker(records, saved_config(records), said.append)
    (started,) = process.call_args.args
    assert started and "open-sesame" not in " ".join([*started, *said])
    assert not Path(process.call_args.kwargs["env"]["TMPDIR"]).exists()
    assert upload.main([str(run), "--uri", uri]) == 1


def test_a_model_that_is_not_taken_is_a_warning(run, monkeypatch):
    said, refuse = [], Mock(side_effect=ConnectionError("gone\n<html>"))
    monkeypatch.setattr(upload, "tell", said.append)
    upload._send_model(Mock(storage=Storage(str(run)), send_model=refuse))
    warning = "say warning: MLflow did not take the run's model (ConnectionError: gone); send it: "
    assert said == [f"{warning}{interpreter()} -m learner.upload {run}"]


@pytest.mark.long
def test_retries_leave_no_threads_and_no_doubles(run, tmp_path, monkeypatch):
    """A store whose metrics work and whose artifacts do not: every sync fails."""
    (tmp_path / "mlartifacts").write_text("a file, where a folder should be")
    uri, told = f"sqlite:///{tmp_path}/mlflow.db", []
    monkeypatch.setattr(upload, "tell", told.append)
    monkeypatch.setattr(upload, "RETRY_SECONDS", 0.2)
    gone_after(monkeypatch, 6)
    assert upload.follow(Mirror(Storage(str(run)), uri, "tributary")) == 1
    assert told.count("state failing") >= 3 and sum(line.startswith("say warning") for line in told) == 1
    deadline = time.monotonic() + 10  # the last one ends by itself: its run is over
    while any("SystemMetrics" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    client, shown = only_run(uri)
    for key in shown.data.metrics:
        steps = Counter(metric.step for metric in client.get_metric_history(shown.info.run_id, key))
        assert max(steps.values()) == 1, f"{key} is logged twice at a step"


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
            wait_for_metrics(tmp_path / "server.db", "loss")  # the witness: epoch 0 was there
            os.killpg(server.pid, signal.SIGKILL)
        if epoch == 2:
            time.sleep(6)
        return real(self, epoch, *rest)

    monkeypatch.setattr(InProcessRunner, "train_epoch", server_dies_in_epoch_1)
    named = ["mlflow.registered_model=shapes", "mlflow.group=sweep", "mlflow.enabled=true"]
    try:
        assert main([*settings, *named, f"run.dir={tmp_path / 'run'}"]) == 0
        said = capfd.readouterr().out
        assert said.count("warning: MLflow") == 1 and "python -m learner.upload" in said
        assert [line["epoch"] for line in Records.open(Storage(str(tmp_path / "run"))).lines] == [-1, 0, 1, 2]
        assert upload.main([str(tmp_path / "run")]) == 1
        server = serve(tmp_path, port)
        for _ in range(2):
            assert upload.main([str(tmp_path / "run")]) == 0
            assert_complete(uri, tmp_path / "run", "shapes")
        (version,) = mlflow.MlflowClient(uri).search_model_versions("name='shapes'")
        adapter = mlflow.diffusers.load_model(f"models:/shapes/{version.version}").adapter_path
        both = ["kohya.safetensors", "pytorch_lora_weights.safetensors"]
        assert sorted(file.name for file in Path(adapter).iterdir()) == both
    finally:
        os.killpg(server.pid, signal.SIGKILL)
