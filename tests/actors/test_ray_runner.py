"""The service on its own local Ray cluster: the same bits however many actors."""

import json

import pytest

from learner.run import main


def lora(folder) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "checkpoints/latest/lora").iterdir())]


@pytest.fixture(scope="module")
def unbroken(small_settings, tmp_path_factory):
    """Two epochs in process: what every other way to run must reproduce."""
    folder = tmp_path_factory.mktemp("runs") / "inprocess"
    assert main([*small_settings, "run.runner=inprocess", f"run.dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize("samplers", [1, 3])
def test_any_number_of_samplers_gives_the_bits_of_the_inprocess_run(
    cluster, unbroken, small_settings, tmp_path, samplers
):
    assert main([*small_settings, f"sampler.actors={samplers}", f"run.dir={tmp_path / 'run'}"]) == 0
    assert lora(tmp_path / "run") == lora(unbroken)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [-1, 0, 1]
    assert [line["policy_version"] for line in lines] == [0, 1, 2]
    assert [line["trajectories"] for line in lines] == [0, 8, 8]
    assert all(line["loss"] is not None and line["reward_std"] > 0 for line in lines[1:])


def test_another_seed_gives_another_lora(unbroken, small_settings, tmp_path):
    assert main([*small_settings, "run.runner=inprocess", "run.seed=1", f"run.dir={tmp_path / 'run'}"]) == 0
    assert lora(tmp_path / "run") != lora(unbroken)
