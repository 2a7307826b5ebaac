"""Runs on Ray that shall not go on: one clear message, nothing half-written, nothing left."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray_processes
from emulated_run import SETTINGS

from learner.config import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.long]

# As `python -m learner.run` does, over emulated parts that take half a second to score a chunk.
LAUNCH = """
from cluster import signals

signals.watch("learner.run")
import driver

signals.leave(driver.main())
"""
EMULATED = ["-c", LAUNCH, "--seconds", "0", "0.5", "0", "--", *SETTINGS, "learner.ranks=1"]
SECRETS = {"RAY_AUTH_TOKEN": "c0ffee" * 10 + "abcd", "HF_TOKEN": "hf_nobodysTokenAtAll"}
STOPS = {
    "ctrl-c": ([signal.SIGINT], 130),
    "ctrl-c twice": ([signal.SIGINT, signal.SIGINT], 130),
    "sigterm": ([signal.SIGTERM], 143),
    "hang-up": ([signal.SIGHUP], 129),
}


@pytest.fixture
def start(tmp_path):
    """Start a run with known tokens in a session of its own, like a terminal: start() -> (process, Ray's folder)."""
    started = []

    def go(*command):
        temporary = tempfile.mkdtemp(prefix="tr-", dir="/tmp")
        settings = ["train.epochs=50", "mlflow.enabled=true", f"run.dir={tmp_path / 'run'}"]
        process = subprocess.Popen(
            [sys.executable, *command, *settings], cwd=tmp_path, text=True, start_new_session=True,
            stdout=(tmp_path / "out").open("w"), stderr=(tmp_path / "err").open("w"),
            env={**os.environ, **SECRETS, "RAY_TMPDIR": temporary, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/faults'}"},
        )  # fmt: skip
        started.append(process)
        return process, temporary

    yield go
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def said(tmp_path) -> str:
    """The run's one line."""
    out, err = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    assert "Traceback" not in out + err and not any(secret in out + err for secret in SECRETS.values())
    (line,) = [line for line in err.splitlines() if line.startswith("learner.run:")]
    return line


def wait_for(there, process, seconds=150):
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def files_with_secrets(*folders) -> list[str]:
    patterns = [part for secret in SECRETS.values() for part in ("-e", secret)]
    done = subprocess.run(["grep", "-rlasF", *patterns, *map(str, folders)], capture_output=True, text=True, timeout=60)
    return done.stdout.split()


@pytest.mark.parametrize("how", STOPS)
def test_a_signal_in_mid_epoch_leaves_nothing(how, start, tmp_path):
    signals, status = STOPS[how]
    process, temporary = start(*EMULATED)
    wait_for((tmp_path / "run/checkpoints/step-000002/state.json").exists, process)
    wait_for(lambda: "mlflow_run_id" in json.loads((tmp_path / "run/run.json").read_text()), process)
    time.sleep(0.3)  # an epoch takes at least a second
    traces = ray_processes.traces(temporary)
    assert [path.stat().st_mode & 0o077 for path in Path(temporary).iterdir()] == [0, 0]  # Ray, MLflow
    assert any("learner.upload" in line for line in ray_processes.of(temporary))
    assert files_with_secrets(temporary, tmp_path) == []
    for number in signals:
        os.killpg(process.pid, number)  # as a terminal does
        time.sleep(0.2)
    assert process.wait(10) == status
    run = tmp_path / "run"
    assert said(tmp_path) == f"learner.run: interrupted; the same command goes on from what is done in {run}"
    traces.assert_nothing_left()
    assert not list(run.rglob("*.new")) and files_with_secrets(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "after"),
    [
        (signal.SIGINT, 0.5),
        *(
            pytest.param([signal.SIGTERM, signal.SIGINT][i % 2], seconds, marks=pytest.mark.slow)
            for i, seconds in enumerate((0.5, 2, 4, 6, 8, 10, 12, 14, 17))
        ),
    ],
)
def test_a_signal_while_it_starts_leaves_nothing(number, after, start, small_settings, tmp_path):
    """While torch is imported, the input checked, Ray started, the actors."""
    process, temporary = start("-m", "learner.run", *small_settings, "sampler.actors=1", "reward.actors=1")
    time.sleep(after)
    # Ctrl-C is for the whole group, `kill` for one. (Ray's own servers, told to end in mid-start, abort the driver.)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait(10) == 128 + number
    assert re.search("interrupted before anything was started|the same command goes on", said(tmp_path))
    assert ray_processes.all_gone(temporary) and not os.listdir(temporary)
