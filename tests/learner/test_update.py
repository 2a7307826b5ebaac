"""The learner: what each setting does to gradients, and stale weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scored_epochs import micro_batches, scored_epoch, stir

from diffusion import lora
from learner import build, state
from learner.experience import concatenate
from learner.objectives.base import Transitions
from learner.protocol.receipts import StaleWeights
from learner.state import UnusableState
from learner.update import Learner, NonFiniteGradient


@pytest.fixture
def prepared(small_config):
    """A learner on joint loss with an adapter and a flow network that do something, and an epoch for it."""
    config = small_config("flow.fit_steps=0", "objective.penalty=squared", "objective.last_transition=train")
    learner = build.build_learner(config)
    stir(learner)
    return learner, scored_epoch(config, learner.publish(1))


def batch_of(learner: Learner, epoch) -> Transitions:
    return concatenate(micro_batches(learner, epoch))


def test_just_sampled_trajectories_have_their_stored_log_pf(prepared):
    """The ratio before the first update is 1: the learner's network is the sampler's."""
    learner, epoch = prepared
    batch = batch_of(learner, epoch)
    with torch.no_grad():
        output, _ = learner.model.predict(batch.x, batch.t, batch.embeddings, learner.config.sampler.guidance)
    recomputed = learner.kernel.log_pf(output, batch.t, batch.x, batch.x_next, "mean")
    torch.testing.assert_close(recomputed, batch.log_pf_old / batch.x[0].numel(), rtol=0, atol=1e-5)
    assert learner.loss(batch, beta=1.0)[1]["drift"].item() < 1e-9


def test_last_transition_meets_the_terminal_reward_and_others_the_stored_value(prepared):
    learner, epoch = prepared
    batch = batch_of(learner, epoch)
    assert torch.equal(batch.reward_next[:3], batch.reward[1:4]) and torch.equal(batch.x_next[:3], batch.x[1:4])
    log_pf = torch.zeros(len(batch.t))
    delta = learner.objective.residual(batch, log_pf, learner.flow, 5.0, flow_gradient=False)
    batch.reward_terminal += 1.0
    batch.reward_next += 10.0
    moved = learner.objective.residual(batch, log_pf, learner.flow, 5.0, flow_gradient=False) - delta
    fade = learner.kernel.abar(batch.t_next).sqrt()  # the preset's forward_looking_decay
    expected = torch.where(batch.terminal, -5.0, -50.0 * fade)
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-2)
    assert batch.terminal.sum() == 8 and (batch.t_next[batch.terminal] == 0).all()


def test_skipping_the_last_transition_makes_the_state_before_it_terminal(small_config):
    config = small_config("flow.fit_steps=0", "objective.last_transition=skip")
    learner = build.build_learner(config)
    batch = batch_of(learner, scored_epoch(config, learner.published))
    last_trained = int(learner.kernel.timesteps[-2])
    assert batch.t.min() == last_trained and (batch.terminal == (batch.t == last_trained)).all()


def test_gradients_go_where_the_paper_says(prepared):
    learner, epoch = prepared
    batch = batch_of(learner, epoch)
    learner.loss(batch, 5.0, flow_gradient=True)[0].backward()
    assert all(p.grad is not None for p in [*learner.policy_parameters, *learner.flow_parameters])
    frozen = [p for name, p in learner.model.unet.named_parameters() if "lora_" not in name]
    assert all(p.grad is None for p in frozen)
    for parameter in learner.flow_parameters:
        parameter.grad = None
    learner.loss(batch, 5.0, flow_gradient=False)[0].backward()
    assert all(p.grad is None for p in learner.flow_parameters)


@pytest.mark.long
@pytest.mark.parametrize("bound", [0, 1, 2])
def test_trajectories_may_lag_as_far_as_the_bound_also_after_a_resume(bound, small_config):
    config = small_config(f"train.max_staleness={bound}", "flow.fit_steps=0", "flow.warmup_steps=0")
    learner = build.build_learner(config)
    made = []  # an epoch of every version
    for version in range(4):
        made.append(scored_epoch(config, learner.published))
        if version < 3:
            metrics = learner.train_epoch(version, 1.0, [made[version]]).metrics
            assert metrics.get("staleness_max") == (0 if bound else None)
            learner.publish(version + 1)
    resumed = build.build_learner(config, learner.state_files())
    for either in (learner, resumed):
        assert sorted(either.recent) == list(range(3 - bound, 4))
        for lag in range(4):
            if lag > bound:
                with pytest.raises(StaleWeights, match=f"as version {3 - lag}.*version 3 is"):
                    either.train_epoch(3, 1.0, [made[3 - lag]])
                continue
            metrics = either.train_epoch(3, 1.0, [[made[3 - lag][0], made[3][1]]]).metrics
            assert not bound or (metrics["staleness_max"], metrics["staleness_mean"]) == (lag, lag / 2)
        forged = [(replace(one, adapter_sha256=made[0][0][0].adapter_sha256), scores) for one, scores in made[3]]
        with pytest.raises(StaleWeights):
            either.train_epoch(3, 1.0, [forged])


def test_a_sampler_that_skips_the_load_is_found_out(small_config, monkeypatch):
    """The receipt is of the adapter as it stands in the module, not of what was sent."""
    config = small_config("lora.alpha=3")  # as in no other test: its epochs are not made yet
    learner = build.build_learner(config)
    stir(learner)
    monkeypatch.setattr(lora, "load", lambda unet, flat: None)
    epoch = scored_epoch(config, learner.publish(1))
    with pytest.raises(StaleWeights, match="did not arrive"):
        learner.train_epoch(0, 1.0, [epoch])


def test_a_gradient_that_is_not_finite_changes_nothing_and_nothing_new_is_published(prepared):
    learner, epoch = prepared
    batch = batch_of(learner, epoch)
    batch.reward_terminal[:] = float("nan")
    before = lora.snapshot(learner.model.unet, 0).sha256
    with pytest.raises(NonFiniteGradient, match="kept"):
        learner.update([batch], len(batch.t), 5.0)
    assert lora.snapshot(learner.model.unet, 0).sha256 == before
    with pytest.raises(StaleWeights, match="bitwise version 1"):
        learner.publish(2)


def test_a_resumed_learner_has_the_rates_of_its_config(small_config):
    """A run that ended with a gradient that is not finite goes on with lower ones."""
    files = build.build_learner(small_config()).state_files()
    lower = build.build_learner(small_config("learner.learning_rate=1e-7", "flow.learning_rate=1e-8"))
    lower.restore(files)
    assert [part.param_groups[0]["lr"] for part in (lower.policy_optimizer, lower.flow_optimizer)] == [1e-7, 1e-8]


def test_a_linear_schedule_rises_and_falls_to_nothing_and_a_constant_one_stays(small_config):
    def rates(*settings: str) -> list[float]:
        config = small_config("learner.learning_rate=2", "train.epochs=50", *settings)
        learner, every, found = build.build_learner(config), config.steps_per_epoch, []
        for number in range(50 * every):
            learner._set_rate(number // every, number % every)
            found.append(learner.policy_optimizer.param_groups[0]["lr"])
        return found

    linear = rates("learner.schedule=linear", "train.replay_updates=1")
    top = round(0.05 * len(linear))
    assert linear[:top] == pytest.approx([2 * (i + 1) / top for i in range(top)])
    assert linear[top:] == pytest.approx(
        [2 * (len(linear) - i) / (0.95 * len(linear)) for i in range(top, len(linear))]
    )
    assert set(rates("train.replay_updates=1")) == {2.0}


def test_adams_second_decay_is_the_configs(small_config):
    learner = build.build_learner(small_config("learner.adam_beta2=0.9"))
    assert learner.policy_optimizer.param_groups[0]["betas"] == (0.9, 0.9)
    assert build.build_learner(small_config()).policy_optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("content", [b"", b"\x80\x02cos\nsystem\n.", state.dump({}), state.dump({"adapter": 3})])
def test_files_that_are_no_learners_state_are_refused(small_config, content):
    learner = build.build_learner(small_config())
    with pytest.raises(UnusableState, match="remove that checkpoint"):
        learner.restore({state.LEARNER_FILE: content})


def test_flow_only_fits_are_towards_the_annealed_beta(small_config, monkeypatch):
    """A flow that stays at zero has exactly the loss of the epoch's beta, here a tenth of the final one."""
    config = small_config("flow.learning_rate=1e-30", "flow.weight_decay=0", "flow.fit_steps=1", "flow.warmup_steps=0")
    learner = build.build_learner(config)
    epoch, batches, fit = scored_epoch(config, learner.published), [], learner.objective.flow_loss
    monkeypatch.setattr(
        learner.objective, "flow_loss", lambda batch, flow, beta: batches.append(batch) or fit(batch, flow, beta)
    )
    said = learner.train_epoch(0, config.objective.beta / 10, [epoch]).updates[0]["flow_loss"]
    losses = [fit(batches[0], learner.flow, config.objective.beta / share).item() for share in (10, 1)]
    assert said == pytest.approx(losses[0], rel=1e-4) and losses[1] > 2 * losses[0]


@pytest.mark.parametrize("fit_steps", [0, 3])
def test_an_epoch_moves_policy_and_flow(small_config, fit_steps):
    config = small_config(f"flow.fit_steps={fit_steps}")
    learner = build.build_learner(config)
    before, flow = learner.published.sha256, [p.detach().clone() for p in learner.flow_parameters]
    epoch = scored_epoch(config, learner.published)
    training = learner.train_epoch(0, 5.0, [epoch[:1], epoch[1:]])
    assert learner.publish(1).sha256 != before
    assert any(not torch.equal(p, q) for p, q in zip(learner.flow_parameters, flow, strict=True))
    assert np.isfinite(list(training.metrics.values())).all() and training.trajectory_ids == tuple(range(8))
    for name, mean in training.metrics.items():
        assert mean == pytest.approx(np.mean([update[name] for update in training.updates if name in update]))
