"""Bad trajectories on Ray: those whose scoring kills the reward actor every time, and those that are no number."""

import json

import pyarrow.parquet as pq
import pytest

from learner.run import main


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


@pytest.mark.slow
def test_a_prompt_that_kills_every_reward_actor_is_found_and_set_aside(run, tmp_path):
    status, said = run("reward.name=faulty:DiesOfRings", "reward.on_bad_reward=quarantine", "run.chunk_attempts=2")
    assert status == 0, said
    assert totals(tmp_path / "run") == {
        "issued": 8, "sampled": 8, "scored": 8, "trained": 6, "quarantined": 2, "lost": 0,
    }  # fmt: skip
    notes = [json.loads(file.read_text()) for file in (tmp_path / "run/quarantine").glob("*.json")]
    assert [note["prompt"] for note in notes] == ["a red ring"] * 2
    assert all("no reward actor survives scoring it" in note["reason"] for note in notes)
    rows = pq.read_table(tmp_path / "run/trajectories").to_pylist()
    assert sum(row["reward"] is None or row["reward"] != row["reward"] for row in rows) == 2


@pytest.mark.slow
def test_by_default_it_ends_the_run_naming_the_chunk(run, tmp_path):
    status, said = run("reward.name=faulty:DiesOfRings", "run.chunk_attempts=2")
    assert status == 1 and "ActorDied: scoring chunk" in said and "tried 2 times, run.chunk_attempts" in said


@pytest.mark.slow
def test_nan_is_set_aside_by_the_rank_that_would_have_trained_on_it(run, tmp_path):
    status, said = run("reward.name=faulty:NanForRings", "reward.on_bad_reward=quarantine", "learner.ranks=2")
    assert status == 0, said
    assert totals(tmp_path / "run")["quarantined"] == 2 and totals(tmp_path / "run")["trained"] == 6
    assert len(list((tmp_path / "run/quarantine").glob("*.safetensors"))) == 2
