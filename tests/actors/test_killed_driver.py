"""`kill -9` of the driver in mid-epoch 2 of 4, then the same command: as if nothing had been. With a real model;
tests/faults/test_driver_kills.py has all other moments, over emulated parts."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import ray_processes
from emulated_run import outcome

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SLOW_REWARD = """
import time

def brightness(images, prompts):
    time.sleep(0.5)
    return images.mean((1, 2, 3))
"""


@pytest.fixture
def start(small_settings, tmp_path):
    """Start the same run again and again, each with a Ray of its own: start(folder) -> (process, Ray's folder)."""
    (tmp_path / "mine.py").write_text(SLOW_REWARD)

    def go(folder, *overrides):
        temporary = tempfile.mkdtemp(prefix="tr-", dir="/tmp")  # short: sockets' paths are limited
        settings = [*small_settings, "train.epochs=4", "evaluation.every=2", "flow.replay_epochs=2", "sampler.actors=1",
                    "reward.actors=1", "reward.name=mine:brightness", f"run.dir={folder}", *overrides]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-m", "learner.run", *settings], cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "RAY_TMPDIR": temporary},
        )  # fmt: skip
        return process, temporary

    return go


def done(process, temporary) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]
    assert ray_processes.all_gone(temporary)
    return said


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_command_goes_on_bitwise(ranks, start, tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    # With one rank the in-process run is the same, bit by bit, and starts faster.
    runner = "run.runner=" + ("inprocess" if ranks == 1 else "ray")
    done(*start(unbroken, f"learner.ranks={ranks}", runner))

    process, temporary = start(killed, f"learner.ranks={ranks}")
    deadline = time.monotonic() + 200
    while not (killed / "checkpoints/step-000002/state.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
        time.sleep(0.02)
    time.sleep(0.3)  # epochs 0 and 1 are closed, and an epoch takes at least a second
    assert ray_processes.of(temporary)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    assert ray_processes.all_gone(temporary, 60)  # Ray's own doing: its agents look for their parent now and then
    assert [line["epoch"] for line in outcome(killed)["metrics"]] == [-1, 0, 1]
    earlier = {file: file.stat().st_mtime_ns for file in (killed / "trajectories").iterdir()}

    said = done(*start(killed, f"learner.ranks={ranks}"))
    assert "going on from checkpoints/step-000002: 2 of 4 epochs are done" in said
    assert "epoch 1/4" not in said and "epoch 2/4" not in said and "epoch 3/4" in said
    assert all(file.stat().st_mtime_ns == then for file, then in earlier.items())
    assert outcome(killed) == outcome(unbroken)
    assert [row[:2] for row in outcome(killed)["rows"]] == [(epoch, i) for epoch in range(4) for i in range(8)]
