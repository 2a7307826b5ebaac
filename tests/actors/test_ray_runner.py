"""The service on its own local Ray cluster: the same bits however many actors, and clean failures."""

import json
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

ADAPTER = "checkpoints/latest/lora/pytorch_lora_weights.safetensors"


def run(folder, small_settings, *overrides, expect=0, cwd=None):
    settings = [*small_settings, f"run.dir={folder}", *overrides]
    done = subprocess.run(
        [sys.executable, "-m", "learner.run", *settings], capture_output=True, text=True, timeout=300, cwd=cwd
    )
    assert done.returncode == expect, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def unbroken(small_settings, tmp_path_factory):
    """Two epochs in process: what every other way to run must reproduce."""
    folder = tmp_path_factory.mktemp("runs") / "inprocess"
    run(folder, small_settings, "run.runner=inprocess")
    return folder


def same_bits(one, other) -> bool:
    first, second = load_file(one / ADAPTER), load_file(other / ADAPTER)
    assert first.keys() == second.keys()
    return all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize("samplers", [1, 3])
def test_any_number_of_samplers_gives_the_bits_of_the_inprocess_run(unbroken, small_settings, tmp_path, samplers):
    run(tmp_path / "run", small_settings, f"sampler.actors={samplers}")
    assert same_bits(unbroken, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [-1, 0, 1]
    assert [line["policy_version"] for line in lines] == [0, 1, 2]
    assert [line["trajectories"] for line in lines] == [0, 8, 8]
    assert all(line["loss"] is not None and line["reward_std"] > 0 for line in lines[1:])


def test_another_seed_gives_another_lora(unbroken, small_settings, tmp_path):
    run(tmp_path / "run", small_settings, "run.runner=inprocess", "run.seed=1")
    assert not same_bits(unbroken, tmp_path / "run")
