"""Faults in a run with a real model. tests/faults has all kinds of them, over emulated parts, and lost actors around
a real model too (test_matrix_shapes.py, test_hosts.py)."""

from types import SimpleNamespace

import pytest
from emulated_run import totals

from learner.run import main


@pytest.mark.long
@pytest.mark.parametrize("driver_looks", [True, False])
def test_a_skipped_load_ends_the_run(driver_looks, small_settings, tmp_path, monkeypatch, capfd):
    """New weights come, and are never copied into the module. The learner refuses such trajectories even if the driver
    lets them pass."""
    monkeypatch.setattr("diffusion.rollout.lora.load", lambda unet, flat: None)
    if not driver_looks:
        monkeypatch.setattr("learner.inprocess.receipts", SimpleNamespace(check=lambda *_: None))
    settings = ["run.runner=inprocess", "evaluation.images=0", f"run.dir={tmp_path / 'run'}"]
    assert main([*small_settings, *settings]) == 1
    said = capfd.readouterr().err
    assert "StaleWeights: chunk" in said and "epoch 1 was sampled by adapter" in said


@pytest.mark.ray
@pytest.mark.slow
def test_nan_is_set_aside_by_the_rank_that_would_have_trained_on_it(cluster, small_settings, tmp_path):
    """Of prompts one in four is bad."""
    (tmp_path / "prompts.txt").write_text("a red ring\na blue square\na green circle\na yellow square\n")
    settings = [
        f"run.dir={tmp_path / 'run'}", f"prompts.path={tmp_path / 'prompts.txt'}", "sampler.actors=1",
        "prompts.per_prompt=1", "evaluation.images=0", "reward.actors=1", "train.epochs=1", "learner.ranks=2",
        "reward.name=broken_parts:NanForRings", "reward.on_bad_reward=quarantine",
    ]  # fmt: skip
    assert main([*small_settings, *settings]) == 0
    counts = totals(tmp_path / "run")
    assert counts["quarantined"] == 2 and counts["trained"] == 6
    assert len(list((tmp_path / "run/quarantine").glob("*.safetensors"))) == 2
