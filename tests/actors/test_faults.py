"""Faults injected into a run on Ray with a real model: new weights that do not arrive, actors that die or hang. Each
leaves a witness. tests/faults has more of them, over emulated parts."""

import json

import numpy as np
import pytest
from faulty import ChunkKills, DiesOnce, HangsOnce, ScorerDiesOnce, SkipsLoad, StaleAfterRestart

from actors import crew, rollouts
from diffusion.snapshot import Snapshot, digest
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
        status = main(
            [*small_settings, f"run.dir={tmp_path / 'run'}", "sampler.actors=2", "reward.actors=1", *overrides]
        )
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return go


def lora(folder) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "checkpoints/latest/lora").iterdir())]


def trained(folder) -> dict:
    return json.loads((folder / "checkpoints/latest/state.json").read_text())["ledger"]["totals"]


@pytest.mark.parametrize("named", [True, False])
def test_a_push_of_base_only_weights_ends_the_run(named, run, monkeypatch):
    """Named as what they are, or as the right ones."""
    real = rollouts.put

    def base_only(snapshot, what):
        flat = np.zeros_like(snapshot.flat) if snapshot.version else snapshot.flat
        return real(Snapshot(snapshot.version, flat, digest(flat) if named else snapshot.sha256), what)

    monkeypatch.setattr(rollouts, "put", base_only)
    status, said = run()
    assert status == 1 and "StaleWeights" in said and "the new weights did not arrive" in said
    assert "epoch 1/2" in said or "before training" in said


def test_a_skipped_load_ends_the_run(run, monkeypatch):
    monkeypatch.setattr(crew, "SamplerActor", SkipsLoad)
    status, said = run()
    assert status == 1 and "StaleWeights: chunk" in said and "epoch 1 was sampled by adapter" in said


def test_the_learner_refuses_even_if_the_driver_does_not_look(run, monkeypatch):
    monkeypatch.setattr(crew, "SamplerActor", SkipsLoad)
    monkeypatch.setattr("learner.protocol.buffer.receipts.check", lambda *_: None)  # in the driver alone
    status, said = run()
    assert status == 1 and "StaleWeights: chunk" in said


def test_a_restarted_sampler_with_stale_weights_ends_the_run(run, monkeypatch, tmp_path):
    monkeypatch.setattr(crew, "SamplerActor", StaleAfterRestart)
    status, said = run("sampler.actors=1")
    assert (tmp_path / "died").exists() and (tmp_path / "stale").exists()
    assert status == 1 and "StaleWeights" in said and "replacing the actor" in said


@pytest.mark.parametrize(("faulty", "mark"), [(DiesOnce, "died"), (HangsOnce, "hung")])
def test_a_lost_sampler_is_replaced_and_nothing_changes(faulty, mark, run, unbroken, monkeypatch, tmp_path):
    monkeypatch.setattr(crew, "SamplerActor", faulty)
    status, said = run("run.chunk_seconds=8" if mark == "hung" else "run.chunk_seconds=600")
    assert status == 0 and (tmp_path / mark).exists() and "replacing the actor" in said
    assert lora(tmp_path / "run") == lora(unbroken)
    totals = trained(tmp_path / "run")
    # One chunk of four was in its hands, and perhaps one queued behind it.
    assert totals["trained"] == 16 and totals["lost"] in (4, 8) and totals["sampled"] == 16


def test_a_lost_reward_actor_is_replaced_and_nothing_changes(run, unbroken, monkeypatch, tmp_path):
    monkeypatch.setattr(crew, "RewardActor", ScorerDiesOnce)
    status, said = run()
    assert status == 0 and (tmp_path / "scorer-died").exists() and "replacing the actor" in said
    assert lora(tmp_path / "run") == lora(unbroken)
    totals = {"issued": 16, "sampled": 16, "scored": 16, "trained": 16, "quarantined": 0, "lost": 0}
    assert trained(tmp_path / "run") == totals


def test_a_reward_that_fails_is_named_with_its_own_words(run):
    status, said = run("reward.name=faulty:Raises")
    assert status == 1 and "BadReward: reward faulty:Raises failed" in said and "the reward's own words" in said


def test_a_chunk_that_no_sampler_survives_ends_the_run_naming_it(run, monkeypatch):
    monkeypatch.setattr(crew, "SamplerActor", ChunkKills)
    status, said = run("run.chunk_attempts=2")
    assert status == 1 and "ActorDied: sampling chunk 1 of epoch 0" in said
    assert "run.chunk_attempts); its prompts: " in said and "sampler.chunk_size" in said
