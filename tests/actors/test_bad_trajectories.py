"""Rewards that are no number, on Ray: set aside by the rank that would have trained on them."""

import json

import pytest

from learner.run import main

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_nan_is_set_aside_by_the_rank_that_would_have_trained_on_it(cluster, small_settings, tmp_path):
    """Of prompts one in four is bad."""
    (tmp_path / "prompts.txt").write_text("a red ring\na blue square\na green circle\na yellow square\n")
    settings = [
        *small_settings, f"run.dir={tmp_path / 'run'}", f"prompts.path={tmp_path / 'prompts.txt'}", "sampler.actors=1",
        "prompts.per_prompt=1", "evaluation.images=0", "reward.actors=1", "train.epochs=1", "learner.ranks=2",
        "reward.name=faulty:NanForRings", "reward.on_bad_reward=quarantine",
    ]  # fmt: skip
    assert main(settings) == 0
    totals = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())["ledger"]["totals"]
    assert totals["quarantined"] == 2 and totals["trained"] == 6
    assert len(list((tmp_path / "run/quarantine").glob("*.safetensors"))) == 2
