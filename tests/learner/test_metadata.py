"""A reward that needs a column of the prompt file: in a run, its records, a resumed run, an evaluation, and on Ray."""

import csv
import json

import pyarrow.parquet as pq
import pytest

from commands import evaluate
from learner.run import main

ROWS = [("a red circle on a white background", "1.5"), ("a blue ring on a black background", "-0.5")]


@pytest.fixture
def settings(small_settings, tmp_path):
    write(tmp_path, ROWS)
    return [*small_settings, "reward.name=weighted_by_column:Redder", f"prompts.path={tmp_path / 'prompts.csv'}"]


def write(folder, rows) -> None:
    with (folder / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "weight"), *rows])


def lora(run) -> bytes:
    return (run / "checkpoints/latest/lora/pytorch_lora_weights.safetensors").read_bytes()


def test_a_column_reaches_the_reward_and_the_records_and_a_resumed_run_goes_on_to_the_bit(settings, tmp_path, capsys):
    one, two, settings = tmp_path / "one", tmp_path / "two", [*settings, "run.runner=inprocess"]
    assert main([*settings, f"run.dir={one}"]) == 0
    rows = pq.read_table(next((one / "trajectories").glob("*.parquet"))).to_pylist()
    weights = dict(ROWS)
    assert rows and all(json.loads(row["metadata"]) == {"weight": weights[row["prompt"]]} for row in rows)
    assert all((row["reward"] > 0) == (float(weights[row["prompt"]]) > 0) for row in rows)
    assert main([*settings, "train.epochs=1", f"run.dir={two}"]) == 0
    assert main([*settings, f"run.dir={two}"]) == 0
    assert lora(one) == lora(two)
    assert evaluate.main([str(one), "--images", "4", "reward.name=weighted_by_column:Redder"]) == 0
    write(tmp_path, [(prompt, "2") for prompt, _ in ROWS])
    capsys.readouterr()
    assert main([*settings, "train.epochs=3", f"run.dir={two}"]) == 2
    assert "began with others; put them back" in capsys.readouterr().err
    write(tmp_path, [(prompt,) for prompt, _ in ROWS])
    (tmp_path / "prompts.csv").write_text("prompt,tag\na red circle,x\n")
    assert main([*settings, f"run.dir={tmp_path / 'three'}"]) == 2
    said = capsys.readouterr().err
    assert "reward weighted_by_column:Redder needs a column 'weight', which 1 of 1 prompts do not have" in said
    assert "columns beside the prompt: tag" in said and not (tmp_path / "three").exists()


@pytest.mark.ray
@pytest.mark.long
def test_on_ray_the_same_bits(settings, tmp_path, cluster):
    assert main([*settings, "run.runner=inprocess", f"run.dir={tmp_path / 'inprocess'}"]) == 0
    assert main([*settings, "sampler.actors=2", f"run.dir={tmp_path / 'ray'}"]) == 0
    assert lora(tmp_path / "inprocess") == lora(tmp_path / "ray")
