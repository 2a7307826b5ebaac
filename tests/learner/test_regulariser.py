"""What the regulariser holds the policy to: what it was before the epoch's updates, whoever sampled."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scored_epochs import micro_batches, scored_epoch, stir

from learner import build, state
from learner.experience import Experience
from learner.update import ANCHOR

HELD = 1000.0


@pytest.fixture
def lagging(small_config):
    """Makes a learner whose published version is 1, stirred far from version 0, and an epoch that version 0 sampled."""

    def make(*settings: str, lag: int = 1):
        config = small_config("train.max_staleness=1", f"objective.regulariser={HELD}", *settings)
        learner = build.build_learner(config)
        epoch = scored_epoch(config, learner.published) if lag else None
        stir(learner)
        now = learner.publish(1)
        return learner, epoch or scored_epoch(config, now)

    return make


def outputs_now(learner, pair) -> np.ndarray:
    """The learner's own output at every selected transition of a chunk, one by one."""
    one = Experience(*pair)
    batches = (one.gather(np.array([i]), learner.model, learner.config) for i in range(len(one)))
    with torch.no_grad():
        return torch.cat([learner.policy.output(each) for each in batches]).numpy().reshape(pair[0].model_output.shape)


def weights(learner) -> np.ndarray:
    return np.array(learner.publish(learner.published.version + 1).flat)


@pytest.mark.long
def test_a_lagging_epoch_is_held_as_if_the_present_policy_had_sampled_it(lagging):
    learner, epoch = lagging()
    learner.train_epoch(1, 5.0, [epoch[:1], epoch[1:]])
    (other, _), (stuck, _) = lagging(), lagging()
    start, now = np.array(other.published.flat), {"policy_version": 1, "adapter_sha256": other.published.sha256}
    held_to_the_past = [(replace(made, **now), scores) for made, scores in epoch]
    asif = [(replace(pair[0], model_output=outputs_now(other, pair)), pair[1]) for pair in held_to_the_past]
    other.train_epoch(1, 5.0, [asif[:1], asif[1:]])
    stuck.train_epoch(1, 5.0, [held_to_the_past[:1], held_to_the_past[1:]])
    ends = [weights(one) for one in (learner, other, stuck)]
    moved, apart, apart_from_stuck = (np.linalg.norm(end - ends[1]) for end in (start, ends[0], ends[2]))
    assert apart < 0.1 * moved < apart_from_stuck  # Adam's steps where the gradient is but noise differ


def test_the_loss_counts_the_way_from_the_anchor_and_reports_that_since_rollout(lagging):
    learner, epoch = lagging()
    (one, *_) = learner._anchored([Experience(*epoch[0])])
    assert np.allclose(one.prepared[ANCHOR], outputs_now(learner, epoch[0]), atol=1e-5)
    batch = next(iter(learner._micro_batches(one, 5.0)))
    with torch.no_grad():
        held, parts = learner.loss(batch, 5.0)
        free, _ = learner.loss(batch, 5.0, held=False)
        assert held.item() == pytest.approx(free.item(), rel=1e-5) and parts["drift"] > 1e-4
        batch.prepared[ANCHOR] += 0.1
        moved, _ = learner.loss(batch, 5.0)
    assert moved.item() - free.item() == pytest.approx(HELD * 0.01, rel=1e-2)


def test_without_a_lag_the_anchor_is_what_the_sampler_sent_at_no_cost(lagging):
    learner, epoch = lagging(lag=0)
    (one, *_) = learner._anchored([Experience(*epoch[0])])
    assert ANCHOR not in one.prepared
    batch = micro_batches(learner, epoch)[0]
    batch.output_old += 0.1
    with torch.no_grad():
        assert learner.loss(batch, 5.0)[0] > learner.loss(batch, 5.0, held=False)[0] + HELD * 0.009


def test_the_first_update_of_a_lagging_epoch_costs_no_pass_more(lagging, monkeypatch):
    learner, epoch = lagging()
    anchored, real = [], learner._anchored
    monkeypatch.setattr(learner, "_anchored", lambda update: anchored.append(len(update)) or real(update))
    free, _ = lagging("objective.regulariser=0")
    for one in (learner, free):
        one.train_epoch(1, 5.0, [epoch])
    assert not anchored and np.array_equal(weights(learner), weights(free))


@pytest.mark.long
def test_replayed_updates_are_held_so_too_and_nothing_of_it_is_kept(small_config):
    config = small_config("train.replay_updates=1", f"objective.regulariser={HELD}")
    learner = build.build_learner(config)
    learner.train_epoch(0, 5.0, [scored_epoch(config, learner.published)])
    stir(learner)
    fresh = scored_epoch(config, learner.publish(1))
    replayed = learner.train_epoch(1, 5.0, [fresh]).updates[-1]
    assert replayed["replay_age"] == 1 and replayed["drift"] > 1e-4
    # Held to version 0, that drift would be in the loss.
    assert replayed["loss"] - replayed["balance"] < 0.5 * HELD * replayed["drift"]
    kept = state.parse_replay(learner.state_files()[state.replay_file(0)])
    assert not any(ANCHOR in one.prepared for part in kept for update in part for one in update)
