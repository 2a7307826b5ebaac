"""Runs on Ray that cannot go on: one clear message, nothing half-written, no process left, and the way on works."""

import json
import os
import subprocess
import sys
import tempfile

import pytest
import ray_processes

REWARDS = """
import torch

def nan_for_rings(images, prompts):
    scores = images.mean((1, 2, 3))
    if "ring" in " ".join(prompts):
        scores[0] = float("nan")
    return scores

def raises(images, prompts):
    raise RuntimeError("the reward's own fault")

class Unbuildable:
    def __init__(self):
        raise OSError("no such weights: /no/weights.bin")
"""


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
        return [line for line in done.stderr.splitlines() if line.startswith("learner.run:")]

    return go


def half_written(folder) -> list:
    return [path for path in folder.rglob("*.new")]


def test_a_nan_reward_names_prompt_and_trajectory(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ring\n")
    (said,) = run(tmp_path / "run", "reward.name=mine:nan_for_rings", "prompts.path=prompts.txt", expect=1)
    assert "BadReward" in said and "nan for prompt 'a red ring'" in said and "trajectory 0" in said
    assert not half_written(tmp_path / "run")


def test_a_reward_that_raises_is_named_with_its_words(run, tmp_path):
    (said,) = run(tmp_path / "run", "reward.name=mine:raises", expect=1)
    assert "BadReward: reward mine:raises failed" in said and "RuntimeError: the reward's own fault" in said


def test_a_reward_that_cannot_be_built_is_named_with_its_words(run, tmp_path):
    (said,) = run(tmp_path / "run", "reward.name=mine:Unbuildable", expect=1)
    assert "ActorDied" in said and "no such weights: /no/weights.bin" in said


def test_a_full_disk_is_said_and_the_same_command_goes_on_when_there_is_room(run, tmp_path, small_settings):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small file system")
    try:
        folder = small / "run"
        (said,) = run(folder, expect=1)
        assert "StorageError" in said and "no space left" in said and str(folder) in said
        assert not half_written(folder)
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
        whole = [path.parent for path in folder.glob("checkpoints/step-*/state.json")]
        assert whole == sorted(folder.glob("checkpoints/step-*")) and whole
        subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
        run(folder, expect=0)
        unbroken = tmp_path / "unbroken"
        run(unbroken, "run.runner=inprocess", expect=0)
        one, other = (path / "checkpoints/latest/lora/kohya.safetensors" for path in (folder, unbroken))
        assert one.read_bytes() == other.read_bytes()
        assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [-1, 0, 1]
    finally:
        subprocess.run(["umount", str(small)], check=True)
