"""What a run stands on fails: node, raylet, disk, MLflow server. It ends as if nothing had been, or typed."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from emulated_run import SETTINGS, outcome, use_emulated_parts
from hosts import HEALTH_CHECKS
from injected import WITNESS
from ray_nodes import cluster_of
from ray_processes import wait_for

from learner import run
from learner.config import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.long]
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    use_emulated_parts(monkeypatch)


@pytest.fixture
def after_the_first_epoch(monkeypatch):
    """after_the_first_epoch(do): call it when that is closed; returns a list of what the driver says."""
    said = []

    def set_up(do) -> list[str]:
        def say(text: str) -> None:
            said.append(text)
            print(text)
            if text.startswith("epoch 1/"):
                do()

        monkeypatch.setattr(run, "say", say)
        monkeypatch.setattr(run, "complain", lambda text: said.append(f"complaint: {text}"))
        return said

    return set_up


@pytest.fixture
def two_nodes(tmp_path, monkeypatch):
    """A head and another node, each with raylet and workers of its own."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE)]))
    for name, value in HEALTH_CHECKS.items():
        monkeypatch.setenv(name, value)
    with cluster_of({"num_cpus": 2}, {"num_cpus": 2}) as cluster:
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster


@pytest.mark.parametrize("kind", ["node", pytest.param("raylet", marks=pytest.mark.slow)])
def test_a_lost_node_costs_nothing_but_time(kind, two_nodes, unbroken, tmp_path):
    """Another one comes in its place: the lost one may have had all reward actors, and the head no room for more."""
    folder = tmp_path / "run"
    settings = [*SETTINGS, "learner.ranks=1", "sampler.actors=4", "run.ready_seconds=120", f"run.dir={folder}"]
    command = [sys.executable, HERE / "driver.py", "--folder", tmp_path, "--fault", "sampler", "serving", kind]
    driver = subprocess.Popen([*command, "--", *settings], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: (tmp_path / WITNESS).exists() or driver.poll() is not None, 150)
    two_nodes.add_node(num_cpus=2)
    said, _ = driver.communicate(timeout=240)
    print(said)
    assert (tmp_path / WITNESS).exists()
    assert driver.returncode == 0 and "Traceback" not in said and "replacing the actor" in said
    assert outcome(folder) == unbroken


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB: enough for a run, as long as nobody else fills it."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def assert_whole(folder: Path) -> None:
    """Nothing is half-written: every line can be read, and every checkpoint has its manifest."""
    assert list(folder.rglob("*.tributary-new")) == []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    whole = [path.parent for path in folder.glob("checkpoints/step-*/state.json")]
    assert sorted(whole) == sorted(folder.glob("checkpoints/step-*")) and whole


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(
    cluster, small_disk, unbroken, after_the_first_epoch, tmp_path
):
    filler = small_disk / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    said = after_the_first_epoch(fill)
    assert run.main([*SETTINGS, f"run.dir={small_disk / 'run'}"]) == 1 and filler.stat().st_size
    (complaint,) = [text for text in said if text.startswith("complaint: ")]
    assert "StorageError" in complaint and "no space left" in complaint and "the same command goes on" in complaint
    assert_whole(small_disk / "run")
    after_the_first_epoch(lambda: None)
    filler.unlink()
    assert run.main([*SETTINGS, f"run.dir={small_disk / 'run'}"]) == 0
    assert any("going on from checkpoints/step-000002" in text for text in said)
    assert outcome(small_disk / "run") == unbroken


@pytest.fixture
def mlflow_server(tmp_path):
    """(its process, its URL, its database)."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    database, log = tmp_path / "mlflow.db", (tmp_path / "server.log").open("w")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}"]
    process = subprocess.Popen(
        [*command, "--artifacts-destination", str(tmp_path / "artifacts"), "--port", str(port), "--workers", "1"],
        stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    yield process, f"http://127.0.0.1:{port}", database
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


@pytest.mark.slow  # of servers that are gone or silent tests/commands/test_upload.py has ordinary ones
@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_a_lost_mlflow_server_costs_a_warning(
    kind, cluster, mlflow_server, unbroken, after_the_first_epoch, tmp_path, monkeypatch
):
    server, url, database = mlflow_server
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")

    def strike() -> None:
        wait_for(lambda: shown(database), 240)
        (tmp_path / WITNESS).touch(exist_ok=False)
        for process in (psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)):
            process.send_signal(signal.SIGKILL if kind == "kill" else signal.SIGSTOP)

    said = after_the_first_epoch(strike)
    mlflow = ["mlflow.enabled=true", f"mlflow.uri={url}", "mlflow.finish_seconds=5"]
    status = run.main([*SETTINGS, *mlflow, f"run.dir={tmp_path / 'run'}"])
    assert (tmp_path / WITNESS).exists() and status == 0
    assert outcome(tmp_path / "run") == unbroken
    assert any("MLflow does not have everything" in text and "learner.upload" in text for text in said)


def shown(database: Path) -> bool:
    """Whether the server knows a run."""
    with suppress(sqlite3.Error), sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        return connection.execute("select count(*) from runs").fetchone()[0] > 0
    return False
