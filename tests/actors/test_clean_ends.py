"""Runs on Ray that cannot go on, or shall not: one clear message, nothing half-written, nothing left, and the way on
works."""

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

pytestmark = [pytest.mark.ray, pytest.mark.long]

REWARDS = """
import time

def nan_for_rings(images, prompts):
    scores = images.mean((1, 2, 3))
    if "ring" in " ".join(prompts):
        scores[0] = float("nan")
    return scores

def slow(images, prompts):
    time.sleep(0.5)
    return images.mean((1, 2, 3))
"""
SECRETS = {"RAY_AUTH_TOKEN": "c0ffee" * 10 + "abcd", "HF_TOKEN": "hf_nobodysTokenAtAll"}


@pytest.fixture
def run(small_settings, tmp_path):
    """Run in a process of its own with a Ray of its own; checks exit status and that no process outlives it by 10 s."""
    (tmp_path / "mine.py").write_text(REWARDS)

    def go(folder, *overrides, expect):
        temporary = tempfile.mkdtemp(prefix="tr-", dir="/tmp")
        settings = [*small_settings, "sampler.actors=1", "reward.actors=1", f"run.dir={folder}", *overrides]
        done = subprocess.run(
            [sys.executable, "-m", "learner.run", *settings], capture_output=True, text=True, timeout=300,
            cwd=tmp_path, env={**os.environ, "RAY_TMPDIR": temporary},
        )  # fmt: skip
        assert done.returncode == expect, done.stderr[-3000:]
        assert "Traceback" not in done.stderr
        assert ray_processes.all_gone(temporary)
        assert not os.listdir(temporary)
        return [line for line in done.stderr.splitlines() if line.startswith("learner.run:")]

    return go


@pytest.fixture
def start(small_settings, tmp_path):
    """Start a run with known tokens in a session of its own, like a terminal: start() -> (process, Ray's folder)."""
    (tmp_path / "mine.py").write_text(REWARDS)
    started = []

    def go():
        temporary = tempfile.mkdtemp(prefix="tr-", dir="/tmp")
        settings = [*small_settings, "train.epochs=50", "sampler.actors=1", "reward.actors=1", "mlflow.enabled=true",
                    "reward.name=mine:slow", f"run.dir={tmp_path / 'run'}"]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "learner.run", *settings], cwd=tmp_path, text=True, start_new_session=True,
            stdout=(tmp_path / "out").open("w"), stderr=(tmp_path / "err").open("w"),
            env={**os.environ, **SECRETS, "RAY_TMPDIR": temporary},
        )  # fmt: skip
        started.append(process)
        return process, temporary

    yield go
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def wait_for(there, process, seconds=150):
    deadline = time.monotonic() + seconds
    while not there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def files_with(text, *folders) -> list[str]:
    found = subprocess.run(["grep", "-rlasF", text, *map(str, folders)], capture_output=True, text=True, timeout=60)
    return found.stdout.split()


STOPS = {
    "ctrl-c": ([signal.SIGINT], 130),
    "ctrl-c twice": ([signal.SIGINT, signal.SIGINT], 130),
    "sigterm": ([signal.SIGTERM], 143),
    "hang-up": ([signal.SIGHUP], 129),
}


@pytest.mark.parametrize(
    "how",
    [name if name == "ctrl-c twice" else pytest.param(name, marks=pytest.mark.slow) for name in STOPS],
)
def test_a_signal_in_mid_epoch_leaves_nothing(how, start, tmp_path):
    signals, status = STOPS[how]
    process, temporary = start()
    wait_for((tmp_path / "run/checkpoints/step-000001/state.json").exists, process)
    wait_for(lambda: "mlflow_run_id" in json.loads((tmp_path / "run/run.json").read_text()), process)
    time.sleep(0.3)  # an epoch takes at least a second
    traces = ray_processes.traces(temporary)
    assert [mode & 0o077 for mode in (path.stat().st_mode for path in Path(temporary).iterdir())] == [
        0,
        0,
    ]  # Ray, MLflow
    assert any("learner.upload" in line for line in ray_processes.of(temporary))
    for secret in SECRETS.values():
        assert files_with(secret, temporary, tmp_path) == []
    for one in signals:
        os.killpg(process.pid, one)  # as a terminal does
        time.sleep(0.2)
    assert process.wait(10) == status
    out, err = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    said = [line for line in err.splitlines() if line.startswith("learner.run:")]
    assert said == [f"learner.run: interrupted; the same command goes on from what is done in {tmp_path / 'run'}"]
    assert "Traceback" not in out + err
    traces.assert_nothing_left()
    assert not half_written(tmp_path / "run")
    for secret in SECRETS.values():
        assert files_with(secret, tmp_path) == [] and secret not in out + err


@pytest.mark.parametrize("after", [0.5, pytest.param(2, marks=pytest.mark.slow), *(
    pytest.param(seconds, marks=pytest.mark.slow) for seconds in (4, 6, 8, 10, 12, 14, 17)
)])  # fmt: skip
@pytest.mark.parametrize("one", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_while_it_starts_leaves_nothing(one, after, start, tmp_path):
    """While torch is imported, the input checked, Ray started, the actors."""
    process, temporary = start()
    time.sleep(after)
    # Ctrl-C is for the whole group, `kill` for one. (Ray's own servers, told to end in mid-start, abort the driver.)
    (os.killpg if one == signal.SIGINT else os.kill)(process.pid, one)
    assert process.wait(10) == 128 + one
    err = (tmp_path / "err").read_text()
    assert "Traceback" not in (tmp_path / "out").read_text() + err
    (said,) = [line for line in err.splitlines() if line.startswith("learner.run:")]
    assert re.search("interrupted before anything was started|the same command goes on", said)
    assert ray_processes.all_gone(temporary) and not os.listdir(temporary)


def half_written(folder) -> list:
    return [path for path in folder.rglob("*.new")]


@pytest.mark.slow
def test_a_nan_reward_names_prompt_and_trajectory(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ring\n")
    (said,) = run(tmp_path / "run", "reward.name=mine:nan_for_rings", "prompts.path=prompts.txt", expect=1)
    assert "BadReward" in said and "nan for prompt 'a red ring'" in said and "trajectory 0" in said
    assert not half_written(tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, smaller than a run."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow  # tests/faults/test_surroundings.py has one in the ordinary tests
def test_a_full_disk_is_said(run, small_disk):
    (said,) = run(small_disk / "run", expect=1)
    assert "StorageError" in said and "no space left" in said and str(small_disk / "run") in said
    assert not half_written(small_disk / "run")
