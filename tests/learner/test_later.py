"""Transitions behind the window: their exact KL to the frozen model, against a slow loop; and what is said of them."""

import numpy as np
import pytest
import torch
from scored_epochs import scored_epoch, stir

from learner import build, later
from learner.config import ConfigError
from learner.experience import Experience

PLAIN = ("objective.kind=rtb", "objective.last_transition=train", "flow.fit_steps=0", "flow.warmup_steps=0")
SETTINGS = (*PLAIN, "objective.window=[0, 1]")


@pytest.fixture
def stirred(small_config):
    config = small_config(*SETTINGS, "objective.later_kl=0.7")
    learner = build.build_learner(config)
    stir(learner)
    return learner, [Experience(*pair) for pair in scored_epoch(config, learner.publish(1))]


def held(learner, update, size=3) -> tuple[np.ndarray, dict[str, float]]:
    for parameter in learner.policy_parameters:
        parameter.grad = None
    metrics = later.hold(update, learner.config, learner.policy, learner.kernel, size)
    return torch.cat([parameter.grad.flatten() for parameter in learner.policy_parameters]).numpy(), metrics


def test_its_gradient_is_that_of_a_slow_loop_whatever_the_micro_batches_and_ranks(stirred):
    learner, update = stirred
    model, kernel, kls = learner.model, learner.kernel, []
    for each in update:
        for row, prompt in enumerate(each.trajectories.chunk.prompts):
            for step in (2, 3):
                x = torch.from_numpy(each.trajectories.states[row : row + 1, step])
                t, text = torch.tensor([int(each.trajectories.timesteps[step])]), model.embed([prompt])
                mine, _ = model.predict(x, t, text, learner.config.sampler.guidance)
                with torch.no_grad(), model.without_lora():
                    frozen, _ = model.predict(x, t, text, learner.config.sampler.guidance)
                apart = kernel.mean(mine, t, x) - kernel.mean(frozen, t, x)
                kls.append((apart.square() / (2 * kernel.variance(t))).sum())
    mean = torch.stack(kls).mean()
    slow = torch.autograd.grad(0.7 * mean, learner.policy_parameters)
    slow = torch.cat([part.flatten() for part in slow]).numpy()
    fast, metrics = held(learner, update)
    assert metrics["later_kl"] == pytest.approx(mean.item(), rel=1e-4) and mean.item() > 0.01
    assert np.abs(fast - slow).max() < 1e-4 * np.abs(slow).max()
    assert np.abs(held(learner, update, 64)[0] - slow).max() < 1e-4 * np.abs(slow).max()
    ranks = [held(learner, [part])[0] for part in update]  # each an equal share of the update
    assert len(ranks) == 2 and np.abs(np.mean(ranks, 0) - slow).max() < 1e-4 * np.abs(slow).max()


def test_an_update_reports_it_and_the_plain_one_does_not(stirred, small_config):
    learner, update = stirred
    epoch = [(each.trajectories, each.scores) for each in update]
    assert learner.train_epoch(1, 1.0, [epoch]).metrics["later_kl"] > 0
    plain = build.build_learner(small_config(*SETTINGS))
    assert later.hold(update, plain.config, plain.policy, plain.kernel, 4) == {}


def test_what_becomes_of_them_is_said(small_config):
    def said(*settings):
        return later.in_words(small_config(*PLAIN, *settings))

    assert said() is None
    assert "transitions 2 to 3, behind those trained, are free" in said("objective.window=[0, 1]")
    assert "transition 3 is held" in said("objective.window=[1, 2]", "objective.later_kl=0.1")
    assert "without noise" in said("objective.window=[0, 1]", "sampler.noise=window")


@pytest.mark.parametrize(
    "settings",
    [(), ("objective.window=[0, 3]",), ("objective.window=[0, 1]", "sampler.noise=window"),
     ("objective.window=auto", "sampler.noise=window")],
)  # fmt: skip
def test_nothing_to_hold_is_refused(settings, small_config):
    with pytest.raises(ConfigError, match=r"objective\.later_kl: no transition with noise is behind the window"):
        small_config("objective.last_transition=train", "objective.later_kl=0.1", *settings)
