"""Runs on Ray that shall not go on: one clear message, nothing half-written, nothing left. (Killed drivers:
tests/faults/test_driver_kills.py.)"""

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
EMULATED = ["-c", LAUNCH, "--seconds", "0", "0.5", "0", "--", *SETTINGS, "learner.ranks=1", "train.epochs=50"]
SECRETS = {"RAY_AUTH_TOKEN": "c0ffee" * 10 + "abcd", "HF_TOKEN": "hf_nobodysTokenAtAll"}
STOPS = {
    "ctrl-c": ([signal.SIGINT], 130),
    "ctrl-c twice": ([signal.SIGINT, signal.SIGINT], 130),
    "sigterm": ([signal.SIGTERM], 143),
    "hang-up": ([signal.SIGHUP], 129),
}


@pytest.fixture
def start(tmp_path):
    """Start a run in tmp_path/run with known tokens in a session of its own, like a terminal, and with a Ray of its
    own: start(command) -> (process, Ray's folder)."""
    started, folder = [], tmp_path / "run"

    def go(*command):
        temporary = tempfile.mkdtemp(prefix="tr-", dir="/tmp")  # short: sockets' paths are limited
        process = subprocess.Popen(
            [sys.executable, *command, f"run.dir={folder}"], cwd=tmp_path, text=True, start_new_session=True,
            stdout=folder.with_suffix(".out").open("w"), stderr=folder.with_suffix(".err").open("w"),
            env={**os.environ, **SECRETS, "RAY_TMPDIR": temporary, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/faults'}"},
        )  # fmt: skip
        started.append(process)
        return process, temporary

    yield go
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def last_words(folder) -> list[str]:
    out, err = (folder.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
    assert "Traceback" not in out + err and not any(secret in out + err for secret in SECRETS.values())
    return [line for line in err.splitlines() if line.startswith("learner.run:")]


def files_with_secrets(*folders) -> list[str]:
    patterns = [part for secret in SECRETS.values() for part in ("-e", secret)]
    done = subprocess.run(["grep", "-rlasF", *patterns, *map(str, folders)], capture_output=True, text=True, timeout=60)
    return done.stdout.split()


@pytest.mark.parametrize(
    "how", ["ctrl-c twice", *(pytest.param(how, marks=pytest.mark.slow) for how in ("ctrl-c", "sigterm", "hang-up"))]
)
def test_a_signal_in_mid_epoch_leaves_nothing(how, start, tmp_path):
    (signals, status), run = STOPS[how], tmp_path / "run"
    process, temporary = start(*EMULATED, "mlflow.enabled=true")
    ray_processes.wait_for((run / "checkpoints/step-000002/state.json").exists, 200)
    ray_processes.wait_for(lambda: "mlflow_run_id" in json.loads((run / "run.json").read_text()), 200)
    time.sleep(0.3)  # an epoch takes at least a second
    traces = ray_processes.traces(temporary)
    assert [path.stat().st_mode & 0o077 for path in Path(temporary).iterdir()] == [0, 0]  # Ray, MLflow
    assert any("learner.upload" in line for line in ray_processes.of(temporary))
    assert files_with_secrets(temporary, tmp_path) == []
    for number in signals:
        os.killpg(process.pid, number)  # as a terminal does
        time.sleep(0.2)
    assert process.wait(10) == status
    assert last_words(run) == [f"learner.run: interrupted; the same command goes on from what is done in {run}"]
    traces.assert_nothing_left()
    assert not list(run.rglob("*.new")) and files_with_secrets(tmp_path) == []


@pytest.mark.parametrize("after", [0.5, *(pytest.param(2 * i, marks=pytest.mark.slow) for i in range(1, 9))])
def test_a_signal_while_it_starts_leaves_nothing(after, start, small_settings, tmp_path):
    """While torch is imported, the input checked, Ray started, the actors."""
    settings = [*small_settings, "train.epochs=50", "sampler.actors=1", "reward.actors=1", "mlflow.enabled=true"]
    process, temporary = start("-m", "learner.run", *settings)
    time.sleep(after)
    # Ctrl-C is for the whole group, `kill` for one. (Ray's own servers, told to end in mid-start, abort the driver.)
    send, number = (os.killpg, signal.SIGINT) if after % 4 else (os.kill, signal.SIGTERM)
    send(process.pid, number)
    assert process.wait(10) == 128 + number
    line, *more = last_words(tmp_path / "run")
    assert re.search("interrupted before anything was started|the same command goes on", line)
    if more:  # on a busy machine: the next start removes what is left
        assert more == ["learner.run: no clean end in time; the same command goes on"]
    else:
        assert ray_processes.all_gone(temporary) and not os.listdir(temporary)
