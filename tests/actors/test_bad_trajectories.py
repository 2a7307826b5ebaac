"""Bad trajectories on Ray: those whose scoring kills the reward actor every time, and those that are no number."""

import json

import pytest

from learner.run import main

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def run(cluster, small_settings, tmp_path, capfd):
    """Prompts of which one in four is the bad one; (exit status, what was said)."""
    (tmp_path / "prompts.txt").write_text("a red ring\na blue square\na green circle\na yellow square\n")

    def go(*overrides):
        status = main(
            [*small_settings, f"run.dir={tmp_path / 'run'}", f"prompts.path={tmp_path / 'prompts.txt'}",
             "prompts.per_prompt=1", "evaluation.images=0", "sampler.actors=1", "reward.actors=1", "train.epochs=1",
             *overrides]
        )  # fmt: skip
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return go


def totals(folder) -> dict:
    return json.loads((folder / "checkpoints/latest/state.json").read_text())["ledger"]["totals"]


def test_a_prompt_that_kills_every_reward_actor_ends_the_run_naming_it(run):
    status, said = run("reward.name=faulty:DiesOfRings", "run.chunk_attempts=2", "reward.on_bad_reward=quarantine")
    assert status == 1 and "ActorDied: scoring chunk" in said and "tried 2 times, run.chunk_attempts" in said
    assert "'a red ring'" in said and "leave out the one that ends the reward's process" in said


def test_nan_is_set_aside_by_the_rank_that_would_have_trained_on_it(run, tmp_path):
    status, said = run("reward.name=faulty:NanForRings", "reward.on_bad_reward=quarantine", "learner.ranks=2")
    assert status == 0, said
    assert totals(tmp_path / "run")["quarantined"] == 2 and totals(tmp_path / "run")["trained"] == 6
    assert len(list((tmp_path / "run/quarantine").glob("*.safetensors"))) == 2
