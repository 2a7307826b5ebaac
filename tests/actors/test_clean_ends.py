"""Runs on Ray that cannot go on: one clear message, nothing half-written, no process left, and the way on works."""

import json
import os
import subprocess
import sys
import tempfile

import pytest
import ray_processes

from learner.run import main

REWARDS = """
import torch

def nan_for_rings(images, prompts):
    scores = images.mean((1, 2, 3))
    if "ring" in " ".join(prompts):
        scores[0] = float("nan")
    return scores
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


def assert_whole(folder) -> None:
    """Every file that is there can be read, and every checkpoint has its manifest."""
    assert not half_written(folder)
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    whole = [path.parent for path in folder.glob("checkpoints/step-*/state.json")]
    assert sorted(whole) == sorted(folder.glob("checkpoints/step-*")) and whole


def test_a_full_disk_is_said(run, small_disk):
    (said,) = run(small_disk / "run", expect=1)
    assert "StorageError" in said and "no space left" in said and str(small_disk / "run") in said
    assert_whole(small_disk / "run")


def test_when_there_is_room_again_the_same_command_goes_on(small_settings, small_disk, tmp_path, capsys):
    arguments = [*small_settings, "run.runner=inprocess"]
    assert main([*arguments, f"run.dir={small_disk / 'run'}"]) == 1
    assert "no space left" in capsys.readouterr().err
    assert_whole(small_disk / "run")
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert main([*arguments, f"run.dir={small_disk / 'run'}"]) == 0
    assert main([*arguments, f"run.dir={tmp_path / 'unbroken'}"]) == 0
    one, other = small_disk / "run", tmp_path / "unbroken"
    adapter = "checkpoints/latest/lora/kohya.safetensors"
    assert (one / adapter).read_bytes() == (other / adapter).read_bytes()
    assert [json.loads(line)["epoch"] for line in (one / "metrics.jsonl").read_text().splitlines()] == [-1, 0, 1]
