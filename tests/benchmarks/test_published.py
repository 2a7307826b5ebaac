"""The baseline's loss and gradients are the project's own, so that comparing their speed compares equals."""

import copy

import pytest
import torch

from benchmarks import pipelines
from benchmarks.parts import COMPARISON
from benchmarks.published import Published
from benchmarks.usual import Rollouts
from learner import build
from learner.config import load_config
from learner.protocol.chunks import training_chunks

BETA = 20.0


@pytest.fixture(scope="module")
def tiny_sd15(tmp_path_factory) -> str:
    return str(pipelines.build(tmp_path_factory.mktemp("sd15"), tiny=True))


@pytest.fixture(scope="module", params=["shapes", "sd15"])
def sides(request, small_settings, tiny_sd15):
    """The project's learner on a scored epoch, and the baseline with a copy of its flow network, both stirred. Of the
    embedded model (v-prediction, trailing grid), and of Stable Diffusion's (epsilon, leading grid), tiny."""
    own = {
        "shapes": ["reward.name=shapes_alignment_soft"],
        "sd15": [
            f"model.path={tiny_sd15}", "reward.name=benchmarks.pipelines:StandInReward", "reward.options={tiny: true}",
        ],
    }  # fmt: skip
    config = load_config(
        overrides=[*small_settings, *own[request.param], *COMPARISON, "run.runner=inprocess", "train.trajectories=4"]
    )
    learner, sampler, scorer = build.build_learner(config), build.build_sampler(config), build.build_scorer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*learner.policy_parameters, *learner.flow_parameters]:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    snapshot, scored = learner.publish(1), []
    for chunk in training_chunks(config, ["a red circle", "a blue ring"], 1):
        trajectories, clean = sampler.sample(chunk, snapshot)
        scored.append((trajectories, scorer.score(clean)))
    baseline = Published(learner.model, scorer, copy.deepcopy(learner.flow), config)
    rollouts = Rollouts.join([
        Rollouts.of(made, scores.rewards[:, -1], learner.model.device) for made, scores in scored
    ])  # fmt: skip
    return learner, scored, baseline, rollouts


def project_gradients(learner, scored) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the first update of an epoch, before clipping."""
    grads: list[torch.Tensor] = []

    def step(optimizer, parameters) -> float:
        grads.extend(parameter.grad.clone() for parameter in parameters)
        optimizer.zero_grad()
        return 0.0

    learner._step = step
    return learner.train_epoch(1, BETA, [scored]).metrics["loss"], grads


def test_loss_and_gradients_are_those_of_the_learner(sides, monkeypatch):
    learner, scored, baseline, rollouts = sides
    loss, grads = project_gradients(learner, scored)
    theirs = baseline.accumulate(rollouts, BETA)
    assert theirs == pytest.approx(loss, rel=1e-5)
    found = [parameter.grad for parameter in [*baseline.policy_parameters, *baseline.flow_parameters]]
    whole = torch.cat([grad.flatten() for grad in grads]).norm()
    for ours, other in zip(grads, found, strict=True):
        assert (other - ours).norm() <= 1e-4 * ours.norm() + 1e-6 * whole  # measured: 1e-5, and 1e-6 of the whole
    # All but a few queries over a single key, at the bottom of Stable Diffusion's U-Net, learn something.
    assert sum(bool(ours.norm() > 0) for ours in grads) > 0.9 * len(grads)
    # Forward-looking rewards are part of what is compared: the equality would mean little if psi did not matter.
    judge = baseline.reward
    monkeypatch.setattr(baseline, "reward", lambda images, prompts: judge(images, prompts) * 1.1)
    assert baseline.accumulate(rollouts, BETA) != pytest.approx(loss, rel=1e-3)


def test_its_sampler_draws_from_the_policy(sides):
    """Each step's noise, recovered from the project's kernel, is standard normal; rewards are of the last states."""
    learner, _, baseline, _ = sides
    prompts = ["a red circle"] * 8
    made = baseline.sample(prompts)
    kernel, n = learner.kernel, len(learner.kernel.timesteps)
    for i, timestep in enumerate(kernel.timesteps.tolist()):
        t = torch.full((len(prompts),), timestep)
        x, x_next = made.states[:, i], made.states[:, i + 1]
        drawn = (x_next - kernel.mean(made.outputs[:, i], t, x)) / kernel.variance(t).sqrt().reshape(-1, 1, 1, 1)
        assert drawn.mean().abs() < 0.1 and abs(drawn.std() - 1) < 0.1
    assert made.states.shape[:2] == (8, n + 1)
    assert torch.equal(made.rewards, baseline.reward(baseline.decode(made.states[:, -1]), prompts))


def test_training_moves_both_networks_and_reset_puts_the_flow_back(sides):
    _, _, baseline, rollouts = sides
    before = [p.detach().clone() for p in [*baseline.policy_parameters, *baseline.flow_parameters]]
    assert len(baseline.train(rollouts, BETA, 2)) == 2
    after = [*baseline.policy_parameters, *baseline.flow_parameters]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    baseline.reset()
    kept = len(baseline.policy_parameters)
    assert all(torch.equal(a, b) for a, b in zip(before[kept:], baseline.flow_parameters, strict=True))
