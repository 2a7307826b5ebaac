"""Faults in a run with a real model. tests/faults has all kinds of them, over emulated parts."""

import json

import pytest
from emulated_run import outcome
from faulty import DiesOnce, ScorerDiesOnce

from actors import rollouts
from learner.run import main


def totals(folder) -> dict[str, int]:
    return json.loads((folder / "checkpoints/latest/state.json").read_text())["ledger"]["totals"]


@pytest.mark.long
@pytest.mark.parametrize("driver_looks", [True, False])
def test_a_skipped_load_ends_the_run(driver_looks, small_settings, tmp_path, monkeypatch, capfd):
    """New weights come, and are never copied into the module. The learner refuses such trajectories even if the driver
    lets them pass."""
    monkeypatch.setattr("diffusion.rollout.lora.load", lambda unet, flat: None)
    if not driver_looks:
        monkeypatch.setattr("learner.protocol.buffer.receipts.check", lambda *_: None)
    settings = ["run.runner=inprocess", "evaluation.images=0", f"run.dir={tmp_path / 'run'}"]
    assert main([*small_settings, *settings]) == 1
    said = capfd.readouterr().err
    assert "StaleWeights: chunk" in said and "epoch 1 was sampled by adapter" in said


@pytest.mark.ray
@pytest.mark.slow
def test_lost_actors_are_replaced_and_nothing_changes(cluster, small_settings, monkeypatch, tmp_path, capfd):
    inprocess, run = tmp_path / "inprocess", tmp_path / "run"
    assert main([*small_settings, "run.runner=inprocess", f"run.dir={inprocess}"]) == 0
    monkeypatch.setattr(rollouts, "SamplerActor", DiesOnce)
    monkeypatch.setattr(rollouts, "RewardActor", ScorerDiesOnce)
    assert main([*small_settings, "sampler.actors=2", "reward.actors=1", f"run.dir={run}"]) == 0
    assert (tmp_path / "died").exists() and (tmp_path / "scorer-died").exists()
    assert capfd.readouterr().out.count("replacing the actor") == 2
    assert outcome(run)["LoRA"] == outcome(inprocess)["LoRA"]
    counts = totals(run)
    assert counts.pop("lost") in (4, 8)  # one chunk of four was in the sampler's hands, and perhaps one queued behind
    assert counts == {"issued": 16, "sampled": 16, "scored": 16, "trained": 16, "quarantined": 0}


@pytest.mark.ray
@pytest.mark.slow
def test_nan_is_set_aside_by_the_rank_that_would_have_trained_on_it(cluster, small_settings, tmp_path):
    """Of prompts one in four is bad."""
    (tmp_path / "prompts.txt").write_text("a red ring\na blue square\na green circle\na yellow square\n")
    settings = [
        f"run.dir={tmp_path / 'run'}", f"prompts.path={tmp_path / 'prompts.txt'}", "sampler.actors=1",
        "prompts.per_prompt=1", "evaluation.images=0", "reward.actors=1", "train.epochs=1", "learner.ranks=2",
        "reward.name=faulty:NanForRings", "reward.on_bad_reward=quarantine",
    ]  # fmt: skip
    assert main([*small_settings, *settings]) == 0
    counts = totals(tmp_path / "run")
    assert counts["quarantined"] == 2 and counts["trained"] == 6
    assert len(list((tmp_path / "run/quarantine").glob("*.safetensors"))) == 2
