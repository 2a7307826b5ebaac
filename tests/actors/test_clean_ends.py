"""Runs on Ray that shall not go on: one clear message, nothing half-written, nothing left. Or killed at once, and the
same command goes on as if nothing had been (tests/faults/test_driver_kills.py: at all other moments)."""

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
from emulated_run import SETTINGS, outcome

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
SLOW_REWARD = """
import time

def brightness(images, prompts):
    time.sleep(0.5)
    return images.mean((1, 2, 3))
"""
SECRETS = {"RAY_AUTH_TOKEN": "c0ffee" * 10 + "abcd", "HF_TOKEN": "hf_nobodysTokenAtAll"}
STOPS = {
    "ctrl-c": ([signal.SIGINT], 130),
    "ctrl-c twice": ([signal.SIGINT, signal.SIGINT], 130),
    "sigterm": ([signal.SIGTERM], 143),
    "hang-up": ([signal.SIGHUP], 129),
}


@pytest.fixture
def start(tmp_path):
    """Start a run with known tokens in a session of its own, like a terminal, and with a Ray of its own:
    start(folder, command) -> (process, Ray's folder)."""
    started = []

    def go(folder, *command):
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


def said(folder) -> tuple[str, list[str]]:
    """What a run said, and its last words."""
    out, err = (folder.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
    assert "Traceback" not in out + err and not any(secret in out + err for secret in SECRETS.values())
    return out, [line for line in err.splitlines() if line.startswith("learner.run:")]


def wait_for(there, process, seconds=200):
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def files_with_secrets(*folders) -> list[str]:
    patterns = [part for secret in SECRETS.values() for part in ("-e", secret)]
    done = subprocess.run(["grep", "-rlasF", *patterns, *map(str, folders)], capture_output=True, text=True, timeout=60)
    return done.stdout.split()


@pytest.mark.parametrize(
    "how", ["ctrl-c twice", *(pytest.param(how, marks=pytest.mark.slow) for how in ("ctrl-c", "sigterm", "hang-up"))]
)
def test_a_signal_in_mid_epoch_leaves_nothing(how, start, tmp_path):
    (signals, status), run = STOPS[how], tmp_path / "run"
    process, temporary = start(run, *EMULATED, "mlflow.enabled=true")
    wait_for((run / "checkpoints/step-000002/state.json").exists, process)
    wait_for(lambda: "mlflow_run_id" in json.loads((run / "run.json").read_text()), process)
    time.sleep(0.3)  # an epoch takes at least a second
    traces = ray_processes.traces(temporary)
    assert [path.stat().st_mode & 0o077 for path in Path(temporary).iterdir()] == [0, 0]  # Ray, MLflow
    assert any("learner.upload" in line for line in ray_processes.of(temporary))
    assert files_with_secrets(temporary, tmp_path) == []
    for number in signals:
        os.killpg(process.pid, number)  # as a terminal does
        time.sleep(0.2)
    assert process.wait(10) == status
    assert said(run)[1] == [f"learner.run: interrupted; the same command goes on from what is done in {run}"]
    traces.assert_nothing_left()
    assert not list(run.rglob("*.new")) and files_with_secrets(tmp_path) == []


@pytest.mark.parametrize("after", [0.5, *(pytest.param(2 * i, marks=pytest.mark.slow) for i in range(1, 9))])
def test_a_signal_while_it_starts_leaves_nothing(after, start, small_settings, tmp_path):
    """While torch is imported, the input checked, Ray started, the actors."""
    settings = [*small_settings, "train.epochs=50", "sampler.actors=1", "reward.actors=1", "mlflow.enabled=true"]
    process, temporary = start(tmp_path / "run", "-m", "learner.run", *settings)
    time.sleep(after)
    # Ctrl-C is for the whole group, `kill` for one. (Ray's own servers, told to end in mid-start, abort the driver.)
    send, number = (os.killpg, signal.SIGINT) if after % 4 else (os.kill, signal.SIGTERM)
    send(process.pid, number)
    assert process.wait(10) == 128 + number
    (line,) = said(tmp_path / "run")[1]
    assert re.search("interrupted before anything was started|the same command goes on", line)
    assert ray_processes.all_gone(temporary) and not os.listdir(temporary)


@pytest.mark.slow
def test_after_kill_9_of_the_driver_the_same_command_goes_on_bitwise(start, small_settings, tmp_path):
    """In mid-epoch 2 of 4, with a real model and 2 ranks."""
    (tmp_path / "mine.py").write_text(SLOW_REWARD)
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    command = [
        "-m", "learner.run", *small_settings, "train.epochs=4", "evaluation.every=2", "flow.replay_epochs=2",
        "sampler.actors=1", "reward.actors=1", "learner.ranks=2", "reward.name=mine:brightness",
    ]  # fmt: skip
    process, _ = start(unbroken, *command)
    assert process.wait(240) == 0
    process, temporary = start(killed, *command)
    wait_for((killed / "checkpoints/step-000002/state.json").exists, process)
    time.sleep(0.3)  # epochs 0 and 1 are closed, and an epoch takes at least a second
    process.kill()
    process.wait(10)
    assert ray_processes.all_gone(temporary, 60)  # Ray's own doing: its agents look for their parent now and then
    assert [line["epoch"] for line in outcome(killed)["metrics"]] == [-1, 0, 1]
    earlier = {file: file.stat().st_mtime_ns for file in (killed / "trajectories").iterdir()}
    process, temporary = start(killed, *command)
    assert process.wait(240) == 0
    assert ray_processes.all_gone(temporary)
    out, _ = said(killed)
    assert "going on from checkpoints/step-000002: 2 of 4 epochs are done" in out
    assert "epoch 1/4" not in out and "epoch 2/4" not in out and "epoch 3/4" in out
    assert all(file.stat().st_mtime_ns == then for file, then in earlier.items())
    assert outcome(killed) == outcome(unbroken)
    assert [row[:2] for row in outcome(killed)["rows"]] == [(epoch, i) for epoch in range(4) for i in range(8)]
