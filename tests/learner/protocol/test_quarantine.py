"""Bad trajectories: each kind stops the run or is set aside, reproducibly, with its files, its count and its limit."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scored_epochs import scored_epoch
from test_open_run import killed
from test_process_group import Ranks

from learner import build, process_group
from learner.inprocess import InProcessRunner
from learner.protocol import quarantine
from learner.run import main
from records.run_folder import Records
from records.storage import Storage
from rewards.scorer import Scorer

EPOCH, BAD = 1, 5  # the trajectory that goes wrong


@pytest.fixture
def settings(small_settings, tmp_path):
    every = ["run.runner=inprocess", "train.epochs=3", "evaluation.every=3", "reward.on_bad_reward=quarantine"]
    return [*small_settings, *every, f"run.dir={tmp_path / 'run'}"]


def poison(monkeypatch, ids=(BAD,), epoch=EPOCH, purpose="train"):
    """Those trajectories' latents come out of the sampler as NaN."""
    real = Scorer.score

    def score(self, clean):
        chunk = clean.chunk
        rows = [i for i, number in enumerate(chunk.trajectory_ids) if number in ids]
        if chunk.purpose == purpose and chunk.epoch == epoch and rows:
            latents = np.array(clean.latents)
            latents[np.isin(clean.row, rows)] = np.nan
            clean = replace(clean, latents=latents)
        return real(self, clean)

    monkeypatch.setattr(Scorer, "score", score)


def test_by_default_a_bad_trajectory_ends_the_run_with_the_way_out(settings, tmp_path, monkeypatch, capsys):
    poison(monkeypatch)
    assert main([*settings, "reward.on_bad_reward=stop"]) == 1
    said = capsys.readouterr().err
    words = "BadReward: latents that are not finite", "trajectory 5 of epoch 1", "reward.on_bad_reward=quarantine"
    assert all(word in said for word in words) and not (tmp_path / "run/quarantine").exists()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dag_db", "nabla_db"])
def test_set_aside_it_is_counted_kept_and_not_trained_on(kind, settings, settings_of, tmp_path, monkeypatch):
    poison(monkeypatch)
    assert main([*settings, *settings_of(kind)]) == 0
    folder = tmp_path / "run"
    facts = json.loads((folder / "quarantine/epoch-000001-trajectory-5.json").read_text())
    assert facts["reason"].startswith("latents that are not finite") and facts["trajectory_id"] == BAD
    arrays = load_file(folder / "quarantine/epoch-000001-trajectory-5.safetensors")
    lengths = {name: len(values) for name, values in arrays.items()}
    assert lengths == {"timesteps": 4, "states": 5, "log_pf": 4, "log_pb": 4}
    assert sorted(path.suffix for path in (folder / "quarantine").iterdir()) == [".json", ".safetensors"]
    lines = Records.open(Storage(str(folder))).lines
    assert [line["quarantined"] for line in lines] == [0, 0, 1, 0] and lines[2]["trajectories"] == 8
    totals = json.loads((folder / "checkpoints/latest/state.json").read_text())["ledger"]["totals"]
    assert totals == {"issued": 24, "sampled": 24, "scored": 24, "trained": 23, "quarantined": 1, "lost": 0}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dag_db", "nabla_db"])
def test_a_stopped_run_sets_aside_the_same(kind, settings, settings_of, tmp_path, monkeypatch):
    poison(monkeypatch)
    settings = [*settings, *settings_of(kind)]
    folder, stopped = tmp_path / "run", tmp_path / "stopped"
    assert main(settings) == 0
    with killed(InProcessRunner, "checkpoint_files", 3):  # its files are written, the epoch is not closed
        main([*settings, f"run.dir={stopped}"])
    assert list((stopped / "quarantine").iterdir())
    stray = stopped / "quarantine/epoch-000001-trajectory-7.json"
    stray.write_text("{}")  # of the unclosed epoch: dropped
    assert main([*settings, f"run.dir={stopped}"]) == 0
    assert not stray.exists()
    for file in (*folder.glob("quarantine/*"), folder / "checkpoints/latest/lora/kohya.safetensors"):
        assert (stopped / file.relative_to(folder)).read_bytes() == file.read_bytes()


@pytest.mark.long
def test_past_the_limit_the_run_ends_and_may_go_on_with_a_higher_one(settings, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, ids=(1, BAD))
    assert main([*settings, "reward.quarantine_limit=1"]) == 1
    assert f"QuarantineFull: 2 trajectories are set aside in {tmp_path}/run/quarantine" in capsys.readouterr().err
    assert len(list((tmp_path / "run/quarantine").glob("*.json"))) == 2
    assert main([*settings, "reward.quarantine_limit=2"]) == 0
    assert len(list((tmp_path / "run/quarantine").glob("*.json"))) == 2


@pytest.mark.long
def test_a_chunk_without_a_good_trajectory_ends_the_run(settings, monkeypatch, capsys):
    poison(monkeypatch, ids=(4, 5, 6, 7))
    assert main(settings) == 1
    assert "BadReward: all 4 trajectories of chunk 1 of epoch 1 are bad; the first: latents" in capsys.readouterr().err


def test_bad_evaluation_images_are_left_out(settings, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, ids=(2,), epoch=0, purpose="evaluate")
    folder = tmp_path / "run"
    assert main([*settings, "train.epochs=1"]) == 0
    assert "warning: 1 evaluation images are bad" in capsys.readouterr().out
    rewards = json.loads((folder / "evaluation/epoch-000000.json").read_text())["reward"]
    assert rewards[2] is None and None not in (rewards[0], rewards[1], rewards[3])
    line = Records.open(Storage(str(folder))).lines[-1]
    assert line["eval_reward_mean"] == pytest.approx(np.mean([rewards[i] for i in (0, 1, 3)]))


def test_more_than_the_limit_is_refused_with_its_folder(tmp_path):
    storage, bad = Storage(str(tmp_path)), quarantine.SetAside(5, {"epoch-000001-trajectory-5.json": b"{}"})
    quarantine.write(storage, [bad], 1, 1)
    with pytest.raises(quarantine.QuarantineFull, match=f"2 trajectories are set aside in {tmp_path}/quarantine"):
        quarantine.write(storage, [replace(bad, files={"other.json": b"{}"})], 2, 1)
    assert sorted(file.name for file in (tmp_path / "quarantine").iterdir()) == [*bad.files, "other.json"]


def spoiled(config, snapshot, row=1):
    (made, scores), *rest = scored_epoch(config, snapshot)
    rewards = scores.rewards.copy()
    rewards[row] = np.nan
    return [(made, replace(scores, rewards=rewards, bad={row: "spoiled"})), *rest]


@pytest.mark.parametrize(("bad", "rows"), [((1,), [0, 2, 2, 3]), ((3,), [0, 1, 2, 0]), ((1, 2, 3), [0, 0, 0, 0])])
def test_the_next_good_one_of_the_chunk_takes_the_place(bad, rows, small_config):
    config = small_config()
    made, scores = scored_epoch(config, build.build_learner(config).published)[0]
    other, others = quarantine.replaced(made, replace(scores, bad=dict.fromkeys(bad, "spoiled")))
    assert other.chunk.trajectory_ids == tuple(rows) and other.chunk.index == made.chunk.index
    assert other.chunk.prompts == tuple(made.chunk.prompts[row] for row in rows)
    for name in ("states", "log_pf", "log_pb", "selected", "model_output"):
        np.testing.assert_array_equal(getattr(other, name), getattr(made, name)[rows])
    np.testing.assert_array_equal(others.rewards, scores.rewards[rows])
    assert quarantine.replaced(made, scores)[0] is made


def test_what_was_bad_does_not_reach_the_gradient(small_config):
    config = small_config("flow.fit_steps=1")
    learner = build.build_learner(config)
    epoch = spoiled(config, learner.published)
    training = learner.train_epoch(0, 5.0, [epoch])
    assert training.trajectory_ids == (0, 2, 3, 4, 5, 6, 7)
    assert [bad.trajectory_id for bad in training.set_aside] == [1]
    assert np.isfinite(list(training.metrics.values())).all()
    kept = [one.trajectories.chunk.trajectory_ids for past in learner.replay for update in past for one in update]
    assert kept == [(0, 2, 2, 3), (4, 5, 6, 7)]


def _rank(rank, count, address, config, epoch, queue) -> None:
    torch.set_num_threads(1)
    process_group.join(address, rank, count, 60, whole_gpu=False)
    learner = build.build_learner(config)
    training = learner.train_epoch(0, 5.0, [epoch[rank::count]])
    queue.put((rank, learner.publish(1).sha256, training.trajectory_ids, len(training.set_aside)))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_of_which_one_has_a_bad_trajectory(small_config):
    config = small_config()
    learner = build.build_learner(config)
    epoch = spoiled(config, learner.published)
    with Ranks(_rank, 2, config, epoch, needs="learner.build") as ranks:
        first, second = sorted(ranks.answers(2))
    assert first[1] == second[1] != learner.published.sha256
    assert first[2:] == ((0, 2, 3), 1) and second[2:] == ((4, 5, 6, 7), 0)


def test_what_takes_a_bad_ones_place_brings_its_own_densities(small_config, settings_of):
    config = small_config(*settings_of("rsub"))
    trajectories, scores = scored_epoch(config, build.build_learner(config).published)[0]
    scores = replace(scores, bad={1: "bad"})
    kept, _ = quarantine.replaced(trajectories, scores)
    for name in ("states", "log_pf", "log_pb", "log_ref"):
        rows = getattr(trajectories, name)
        np.testing.assert_array_equal(getattr(kept, name), rows[[0, 2, 2, 3]])
        assert not np.array_equal(rows[1], rows[2])
