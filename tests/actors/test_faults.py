"""Faults in a run on Ray with a real model. tests/faults has all kinds of them, over emulated parts."""

import json

import pytest
from faulty import DiesOnce, ScorerDiesOnce, SkipsLoad

from actors import crew
from learner.run import main

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def unbroken(small_settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert main([*small_settings, "run.runner=inprocess", f"run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def run(cluster, small_settings, tmp_path, capfd):
    """Run on Ray; (exit status, what was said)."""

    def go(*overrides):
        settings = [*small_settings, f"run.dir={tmp_path / 'run'}", "sampler.actors=2", "reward.actors=1", *overrides]
        status = main(settings)
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return go


def lora(folder) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "checkpoints/latest/lora").iterdir())]


@pytest.mark.parametrize("driver_looks", [True, False])
def test_a_skipped_load_ends_the_run(driver_looks, run, monkeypatch):
    """The learner refuses such trajectories even if the driver lets them pass."""
    monkeypatch.setattr(crew, "SamplerActor", SkipsLoad)
    if not driver_looks:
        monkeypatch.setattr("learner.protocol.buffer.receipts.check", lambda *_: None)
    status, said = run()
    assert status == 1 and "StaleWeights: chunk" in said and "epoch 1 was sampled by adapter" in said


@pytest.mark.parametrize(
    ("shell", "faulty", "mark", "lost"),
    # Of the sampler one chunk of four was in its hands, and perhaps one queued behind it.
    [("SamplerActor", DiesOnce, "died", (4, 8)), ("RewardActor", ScorerDiesOnce, "scorer-died", (0,))],
)
def test_a_lost_actor_is_replaced_and_nothing_changes(shell, faulty, mark, lost, run, unbroken, monkeypatch, tmp_path):
    monkeypatch.setattr(crew, shell, faulty)
    status, said = run()
    assert status == 0 and (tmp_path / mark).exists() and "replacing the actor" in said
    assert lora(tmp_path / "run") == lora(unbroken)
    state = json.loads((tmp_path / "run/checkpoints/latest/state.json").read_text())
    totals = state["ledger"]["totals"]
    assert totals.pop("lost") in lost
    assert totals == {"issued": 16, "sampled": 16, "scored": 16, "trained": 16, "quarantined": 0}


def test_a_reward_that_fails_is_named_with_its_own_words(run):
    status, said = run("reward.name=faulty:Raises")
    assert status == 1 and "BadReward: reward faulty:Raises failed" in said and "the reward's own words" in said
