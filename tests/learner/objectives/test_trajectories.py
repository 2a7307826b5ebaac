"""Objectives of whole trajectories, and the two that came with them, against slow loops (see test_slow_loops.py); and
the same loss and gradient where trajectories are spread over micro-batches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_problem import pick
from scored_epochs import scored_epoch
from test_slow_loops import (
    BETA,
    COUNT,
    PROMPTS,
    SLOPE,
    STEPS,
    WAVE,
    D,
    Model,
    ScalarFlow,
    close,
    loss_of,
    setup,
    slow,
    slow_clipped,
    weight_of,
)  # fmt: skip

from learner import build
from learner.config import load_config
from learner.experience import Experience
from learner.objectives.base import Policy
from learner.objectives.grpo import within_prompts


class Path:
    """One trajectory, transition by transition, in nats: with mean log-probabilities nats per dimension."""

    def __init__(self, every, number, kind, reduction):
        self.kind, self.size = kind, 1 if reduction == "sum" else D
        self.parts = every[number * STEPS : (number + 1) * STEPS]
        self.reward = BETA * self.parts[0].end

    def ratio(self, k, log_pf=None):
        one = self.parts[k]
        other = one.log_pb() if self.kind in ("tb", "sub_tb") else one.log_ref()
        start = one.log_start() if self.kind == "tb" and k == 0 else 0.0
        return ((one.log_pf() if log_pf is None else log_pf) + start - other) / self.size

    def ratios(self):
        return [self.ratio(k) for k in range(STEPS)]

    def ratios_of_the_rollout(self):
        return [self.ratio(k, one.log_pf_old) for k, one in enumerate(self.parts)]

    def log_flow(self, k):
        """Of the k-th state; the last one's is the image's reward."""
        if k == STEPS:
            return self.reward
        one = self.parts[k]
        known = self.size if self.kind == "sub_tb" else 0  # 1: with what is known of it
        return one.log_flow(one.x, one.t, one.a, BETA * one.reward * self.looking, known)

    looking = 0.0


def paths(s, kind, reduction, looking=0.0):
    found = [Path(slow(s), number, kind, reduction) for number in range(COUNT)]
    for each in found:
        each.looking = looking
    return found


def penalty(delta, kind, width=0.5):
    if kind == "squared" or abs(delta) <= width:
        return delta**2
    return 2 * width * (abs(delta) - width / 2)


def slow_log_z(all_paths, settings, before=None):
    """By trajectory, from the rollout's log-ratios."""
    values = [each.reward - sum(each.ratios_of_the_rollout()) for each in all_paths]
    found = []
    for i, prompt in enumerate(PROMPTS):
        others = [values[j] for j in range(COUNT) if PROMPTS[j] == prompt and j != i]
        own = [values[j] for j in range(COUNT) if PROMPTS[j] == prompt]
        if settings == "learned":
            mean = sum(own) / len(own)
            start = mean if before is None else before[prompt]
            found.append(start + 0.1 * (mean - start))
        else:
            found.append(sum(others) / len(others) if others else values[i])
    return found


@pytest.mark.parametrize("shape", ["squared", "huber"])
@pytest.mark.parametrize("log_z", ["group", "learned"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["rtb", "tb"])
def test_trajectory_balance(kind, reduction, log_z, shape):
    for weight in ("uniform", "variance"):  # which scales gradients alone
        s = setup(kind, log_prob_reduction=reduction, log_z=log_z, penalty=shape, huber_width=0.5,
                  transition_weight=weight)  # fmt: skip
        all_paths = paths(s, kind, reduction)
        log_z_of = slow_log_z(all_paths, log_z)
        delta = [z + sum(each.ratios()) - each.reward for z, each in zip(log_z_of, all_paths, strict=True)]
        assert loss_of(s)[0] == pytest.approx(sum(penalty(d, shape) for d in delta) / COUNT, **close)


def test_a_learned_log_z_moves_by_its_rate_and_is_kept():
    s = setup("rtb", log_z="learned")
    all_paths = paths(s, "rtb", "sum")
    memory = {"a": 3.0, "b": -2.0}
    s.objective.memory = dict(memory)
    rewards = [each.parts[0].end for each in all_paths]
    nats = np.array([each.ratios_of_the_rollout() for each in all_paths])
    s.objective.begin_epoch(range(COUNT), PROMPTS, rewards, nats, BETA)
    expected = slow_log_z(all_paths, "learned", memory)
    found = s.objective.prepare(Policy(Model(), 1.0), s.batch)["log_z"]
    assert found.reshape(COUNT, STEPS).T.tolist() == [pytest.approx(expected)] * STEPS
    assert s.objective.memory == pytest.approx({"a": expected[0], "b": expected[1]})


@pytest.mark.parametrize("shape", ["squared", "huber"])
@pytest.mark.parametrize(("segments", "decay"), [("end", 0.9), ("all", 0.6), ("all", 1.0)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", ["rsub", "sub_tb"])
def test_sub_trajectory_balance(kind, reduction, segments, decay, shape):
    s = setup(kind, log_prob_reduction=reduction, segments=segments, segment_decay=decay, penalty=shape,
              huber_width=0.5, forward_looking="base")  # fmt: skip
    expected = fitted = 0.0
    for each in paths(s, kind, reduction, looking=1.0):
        ratios, rollout = each.ratios(), each.ratios_of_the_rollout()
        pairs = [(i, j) for i in range(STEPS) for j in range(i + 1, STEPS + 1) if segments == "all" or j == STEPS]
        weights = [decay ** (j - i) if segments == "all" else 1.0 for i, j in pairs]
        for (i, j), weight in zip(pairs, weights, strict=True):
            delta = each.log_flow(i) + sum(ratios[i:j]) - each.log_flow(j)
            expected += weight / sum(weights) * penalty(delta, shape) / COUNT
        for i in range(STEPS):
            delta = each.log_flow(i) + sum(rollout[i:]) - each.reward
            fitted += penalty(delta, shape) / STEPS / COUNT
    assert loss_of(s)[0] == pytest.approx(expected, **close)
    assert s.objective.flow_loss(s.batch, s.flow, BETA).item() == pytest.approx(fitted, **close)


@pytest.mark.parametrize("weight", ["uniform", "variance"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_residual_db(reduction, weight):
    """Nothing of F is known: it is relative to the reference's own."""
    s = setup("rdb", log_prob_reduction=reduction, transition_weight=weight, forward_looking="base")
    every, size = slow(s), 1 if reduction == "sum" else D

    def delta(one, log_pf):
        here = one.log_flow(one.x, one.t, one.a, BETA * one.reward, 0)
        after = one.log_flow(one.y, one.t_next, one.next, BETA * one.reward_next, 0)
        return here + (log_pf - one.log_ref()) / size - (BETA * one.end if one.terminal else after)

    squares = [weight_of(one, weight, every) * delta(one, one.log_pf()) ** 2 for one in every]
    assert loss_of(s)[0] == pytest.approx(sum(squares) / len(every), **close)
    fitted = [delta(one, one.log_pf_old) ** 2 for one in every]
    assert s.objective.flow_loss(s.batch, s.flow, BETA).item() == pytest.approx(sum(fitted) / len(every), **close)


@pytest.mark.parametrize("weight", ["uniform", "variance"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_grpo(reduction, weight):
    s = setup("grpo", log_prob_reduction=reduction, clip_range=0.02, reference_kl=0.3, transition_weight=weight)
    every, size = slow(s), 1 if reduction == "sum" else D
    rewards = [every[i * STEPS].end for i in range(COUNT)]
    policy = kl = 0.0
    for i, one in enumerate(every):
        own = [rewards[j] for j in range(COUNT) if PROMPTS[j] == PROMPTS[i // STEPS]]
        mean = sum(own) / len(own)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in own) / len(own))
        each = slow_clipped((one.log_pf() - one.log_pf_old) / size, (one.end - mean) / (deviation + 1e-4), 0.02)
        policy += weight_of(one, weight, every) * each / len(every)
        apart = [one.mean(x, one.policy(x)[0]) - one.mean(x, 0.5 * x) for x in one.x]
        kl += sum(number**2 for number in apart) / (2 * one.variance) / len(every)
    loss, parts = loss_of(s)
    assert parts["reference_kl"] == pytest.approx(kl, **close)
    assert loss == pytest.approx(policy + 0.3 * kl, **close)
    assert "reference_output" not in setup("grpo").batch.prepared


def test_advantages_are_within_the_prompt_and_clipped():
    found = within_prompts(("a", "b", "a", "c", "b"), (1.0, 5.0, 3.0, 9.0, 5.0))
    assert found.tolist() == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001, 0, 0])
    assert within_prompts(("a",) * 100, (0.0,) * 99 + (1.0,)).max() == 5


class Wave(torch.nn.Module):
    """The slow loops' policy and flow with parameters."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        start = torch.tensor([SLOPE, WAVE, 1.0], dtype=torch.float64)
        self.numbers = torch.nn.Parameter(start)

    def predict(self, x, t, embeddings, guidance):
        output = self.numbers[0] * x + self.numbers[1] * torch.sin(x)
        return output, output

    def forward(self, x, t, embeddings):
        return self.numbers[2] * ScalarFlow()(x, t, embeddings)


def part_of(batch, index):
    return replace(pick(batch, index), prepared={name: value[index] for name, value in batch.prepared.items()})


CASES = [
    ("rtb", {}), ("rtb", {"penalty": "huber", "huber_width": 0.5}), ("tb", {"log_prob_reduction": "mean"}),
    ("rsub", {}), ("rsub", {"segments": "all"}), ("sub_tb", {"segments": "all", "detach_next_flow": False}),
]  # fmt: skip


@pytest.mark.parametrize("weight", ["uniform", "variance"])
@pytest.mark.parametrize(("kind", "settings"), CASES, ids=lambda value: str(value))
def test_trajectories_spread_over_micro_batches_have_the_whole_ones_loss_and_gradient(kind, settings, weight):
    s = setup(kind, transition_weight=weight, **settings)
    wave = Wave()
    policy, flow = Policy(wave, 1.0), wave if s.flow is not None else None
    loss = s.objective.loss(s.batch, policy.output(s.batch), flow, BETA, True)[0]
    (whole,) = torch.autograd.grad(loss, wave.numbers)
    assert (whole[2] != 0) == (flow is not None) and whole[:2].abs().min() > 0
    for size in (3, 7, 20):
        index = torch.arange(COUNT * STEPS).split(size)
        batches = [part_of(s.batch, rows) for rows in index]
        s.objective.prepare_window(policy, batches, flow, BETA)
        losses, gradient = 0.0, torch.zeros_like(whole)
        for batch in batches:
            part = s.objective.loss(batch, policy.output(batch), flow, BETA, True)[0] * len(batch.t) / (COUNT * STEPS)
            losses, gradient = losses + part.item(), gradient + torch.autograd.grad(part, wave.numbers)[0]
        assert losses == pytest.approx(loss.item(), **close)
        torch.testing.assert_close(gradient, whole, rtol=1e-10, atol=1e-12)
        assert ("slope" in batches[0].prepared) == (len(batches) > 1)


def noise_of_the_gradient(kind: str) -> tuple[float, float]:
    """Variance of a trajectory's gradient, summed over the adapter; and spread of its log-ratios' sum, in nats: of the
    embedded model's own policy, for one prompt."""
    config = load_config(
        overrides=[
            f"objective.kind={kind}", "objective.last_transition=train", "flow.fit_steps=0", "flow.warmup_steps=0",
            "train.trajectories=16", "train.updates_per_epoch=1", "prompts.per_prompt=16", "learner.ranks=1",
            "lora.rank=2",
        ]
    )  # fmt: skip
    learner = build.build_learner(config)
    trajectories, scores = scored_epoch(config, learner.published)[0]
    one = Experience(trajectories, scores)
    learner._prepare([one], 1.0)
    gradients = []
    for positions in np.arange(len(one)).reshape(16, -1):
        loss = learner.loss(one.gather(positions, learner.model, config), 1.0, held=False)[0]
        found = torch.autograd.grad(loss, learner.policy_parameters, materialize_grads=True, allow_unused=True)
        gradients.append(torch.cat([part.flatten() for part in found]))
    spread = float(learner.objective.nats(trajectories).sum(1).std())
    print(kind, scores.rewards[:, -1].std())
    return torch.stack(gradients).var(0).sum().item(), spread


@pytest.mark.long
def test_against_the_noising_kernel_the_noise_does_not_cancel():
    (relative, none), (plain, nats) = noise_of_the_gradient("rtb"), noise_of_the_gradient("tb")
    print(f"variance of the gradient {relative:.0f} and {plain:.0f}, {plain / relative:.0f} times; {nats:.1f} nats")
    assert plain > 100 * relative
    assert none == 0 and nats > 10
