"""Every objective against a slow loop over transitions and numbers in float64, written from the definitions alone."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from diffusion.kernels import DDIMKernel
from learner.config.sections import Objective as Settings
from learner.objectives.base import Policy, Transitions
from learner.objectives.by_name import OBJECTIVES
from learner.objectives.ddpo import advantages
from learner.objectives.kl import leave_one_out

STEPS, COUNT, BETA = 5, 4, 7.0
close = {"rel": 1e-10, "abs": 1e-12}
SHAPE = (2, 2, 2)
D = 8
PROMPTS = ("a", "b", "a", "a")
SLOPE, WAVE, REFERENCE = 0.7, 0.3, 0.5  # of policy SLOPE x + WAVE sin x, and of reference REFERENCE x


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=50, beta_schedule="linear", beta_start=0.02, beta_end=0.2, timestep_spacing="trailing",
        steps_offset=1, set_alpha_to_one=False, prediction_type="v_prediction", clip_sample=False,
    )  # fmt: skip


class Model:
    device = torch.device("cpu")

    def predict(self, x, t, embeddings, guidance, unet=None):
        output = SLOPE * x + WAVE * torch.sin(x)
        return output, output

    def predict_reference(self, x, t, embeddings, guidance):
        return REFERENCE * x


class ScalarFlow(nn.Module):
    def forward(self, x, t, embeddings):
        return torch.sin(x).flatten(1).sum(1) * (1 + t.double() / 1000)


class FieldFlow(nn.Module):
    def forward(self, x, t, embeddings):
        return torch.cos(x) * (1 + t.double() / 1000).reshape(-1, 1, 1, 1)


@dataclass
class Setup:
    objective: object
    batch: Transitions
    output: torch.Tensor
    flow: nn.Module | None
    abar: list[float]


def setup(kind: str, **settings) -> Setup:
    """All transitions of COUNT trajectories of random states, with rewards and gradients at random."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    own = scheduler()
    kernel = DDIMKernel.from_scheduler(own, STEPS)
    objective = OBJECTIVES[kind](Settings(kind=kind, **settings), kernel)
    rewards = draw(COUNT, STEPS + 1)
    trajectory = [draw(COUNT, *SHAPE)]
    for timestep in kernel.timesteps.tolist():  # nearly what the policy would do
        x, t = trajectory[-1], torch.full((COUNT,), timestep)
        trajectory.append(kernel.sample(Model().predict(x, t, None, 1.0)[0], t, x, draw(COUNT, *SHAPE)))
    states = torch.stack(trajectory, 1)
    clean_gradients = draw(COUNT, STEPS + 1, *SHAPE)
    step, row = torch.arange(STEPS).repeat(COUNT), torch.arange(COUNT).repeat_interleave(STEPS)
    times = torch.tensor([*kernel.timesteps.tolist(), 0])
    x = states[row, step].requires_grad_(objective.needs.reward_gradients)
    batch = Transitions(
        x=x, x_next=states[row, step + 1], t=times[step], t_next=times[step + 1], trajectory_id=row,
        embeddings=torch.zeros(COUNT * STEPS, 0, 0), reward=rewards[row, step], reward_next=rewards[row, step + 1],
        reward_terminal=rewards[row, STEPS], terminal=step + 1 == STEPS, log_pf_old=draw(COUNT * STEPS) / 20,
        output_old=draw(COUNT * STEPS, *SHAPE), clean_gradient=clean_gradients[row, step],
        clean_gradient_next=clean_gradients[row, step + 1],
    )  # fmt: skip
    output = Model().predict(x, None, None, 1.0)[0]
    # Ratios near 1, some of them outside of the clip.
    close = kernel.log_pf(output.detach(), batch.t, x.detach(), batch.x_next, "sum")
    batch.log_pf_old = close + batch.log_pf_old
    nats = np.zeros((COUNT, 0))
    batch.log_ref = kernel.log_pf(REFERENCE * x.detach(), batch.t, x.detach(), batch.x_next, "sum")
    if objective.needs.whole_trajectories:
        nats = (objective.log_pf_old(batch) - objective.log_q(batch)).detach().reshape(COUNT, STEPS).numpy()
    objective.begin_epoch(range(COUNT), PROMPTS, rewards[:, -1].tolist(), nats, BETA)
    policy = Policy(Model(), 1.0)
    batch.prepared.update(objective.prepare(policy, batch))
    flow = {"log_flow": ScalarFlow(), "gradient": FieldFlow(), None: None}[objective.needs.flow]
    return Setup(objective, batch, output, flow, own.alphas_cumprod.double().tolist())


class Slow:
    """One transition, number by number."""

    def __init__(self, s: Setup, i: int) -> None:
        batch = s.batch
        self.t, self.t_next, self.terminal = batch.t[i].item(), batch.t_next[i].item(), bool(batch.terminal[i])
        self.a, self.next, self.first = s.abar[self.t], s.abar[self.t_next], s.abar[0]
        self.variance = (1 - self.next) / (1 - self.a) * (1 - self.a / self.next)
        self.x, self.y = batch.x[i].detach().flatten().tolist(), batch.x_next[i].flatten().tolist()
        self.gradient = batch.clean_gradient[i].flatten().tolist()
        self.gradient_next = batch.clean_gradient_next[i].flatten().tolist()
        self.reward, self.reward_next = batch.reward[i].item(), batch.reward_next[i].item()
        self.end = batch.reward_terminal[i].item()
        self.log_pf_old = batch.log_pf_old[i].item()

    def policy(self, x: float) -> tuple[float, float]:
        """Output at x and its derivative."""
        return SLOPE * x + WAVE * math.sin(x), SLOPE + WAVE * math.cos(x)

    def mean(self, x: float, output: float) -> float:
        clean = math.sqrt(self.a) * x - math.sqrt(1 - self.a) * output
        eps = math.sqrt(self.a) * output + math.sqrt(1 - self.a) * x
        return math.sqrt(self.next) * clean + math.sqrt(1 - self.next - self.variance) * eps

    def mean_slope(self, slope: float) -> float:
        """d mean / dx where d output / dx is `slope`: `mean` is linear in both."""
        return self.mean(1.0, slope)

    def log_pf(self) -> float:
        squares = [(y - self.mean(x, self.policy(x)[0])) ** 2 for x, y in zip(self.x, self.y, strict=True)]
        return sum(-square / (2 * self.variance) - 0.5 * math.log(2 * math.pi * self.variance) for square in squares)

    def log_ref(self) -> float:
        squares = [(y - self.mean(x, REFERENCE * x)) ** 2 for x, y in zip(self.x, self.y, strict=True)]
        return sum(-square / (2 * self.variance) - 0.5 * math.log(2 * math.pi * self.variance) for square in squares)

    def log_start(self) -> float:
        """log N(x; 0, I)."""
        return sum(-(x**2) / 2 - 0.5 * math.log(2 * math.pi) for x in self.x)

    def log_pb(self) -> float:
        back, shrink = 1 - self.a / self.next, math.sqrt(self.a / self.next)
        squares = [(x - shrink * y) ** 2 for x, y in zip(self.x, self.y, strict=True)]
        return sum(-square / (2 * back) - 0.5 * math.log(2 * math.pi * back) for square in squares)

    def log_flow(self, x: list[float], t: int, abar: float, psi: float, dimensions: int) -> float:
        known = sum((1 - abar) ** 2 * (number**2 - 1) + math.log((1 - abar) / (1 - self.first)) for number in x) / -2
        return sum(map(math.sin, x)) * (1 + t / 1000) + psi + (known if dimensions == 1 else 0.0)

    def delta(self, beta: float, dimensions: int, fade=lambda abar: 1.0) -> float:
        here = self.log_flow(self.x, self.t, self.a, beta * fade(self.a) * self.reward, dimensions)
        after = self.log_flow(self.y, self.t_next, self.next, beta * fade(self.next) * self.reward_next, dimensions)
        if self.terminal:
            after = beta * self.end
        return here + (self.log_pf() - self.log_pb()) / dimensions - after

    def clean_slope(self, x: float, abar: float, at_end: bool) -> float:
        """d xhat / dx under the reference."""
        return 1.0 if at_end else math.sqrt(abar) - math.sqrt(1 - abar) * REFERENCE

    def nabla(self, residual: bool, strength: float, decay_terminal: bool) -> tuple[float, float, float]:
        """Forward, reverse and terminal loss: means over dimensions."""
        forward = reverse = terminal = 0.0
        back, shrink = 1 - self.a / self.next, math.sqrt(self.a / self.next)
        for x, y, gradient, gradient_next in zip(self.x, self.y, self.gradient, self.gradient_next, strict=True):
            output, slope = self.policy(x)
            score = -(y - self.mean(x, output)) / self.variance
            score_of_x = -score * self.mean_slope(slope)
            fade = self.next if not self.terminal or decay_terminal else 1.0
            at_end = self.t_next == 0
            g_next = BETA * fade * gradient_next * self.clean_slope(y, self.next, at_end)
            h_next = math.cos(y) * (1 + self.t_next / 1000)
            if not self.terminal:
                g_next += h_next
            g = math.cos(x) * (1 + self.t / 1000) + BETA * self.a * gradient * self.clean_slope(x, self.a, False)
            if residual:
                reference = -(y - self.mean(x, REFERENCE * x)) / self.variance
                forward += (score - strength * reference - g_next) ** 2 / D
                reverse += (score_of_x + strength * reference * self.mean_slope(REFERENCE) + g) ** 2 / D
                terminal += h_next**2 / D if self.terminal else 0.0
            else:
                forward += (score - shrink * (x - shrink * y) / back - g_next) ** 2 / D
                reverse += (score_of_x + (x - shrink * y) / back + g) ** 2 / D
        return forward, reverse, terminal


def slow(s: Setup) -> list[Slow]:
    return [Slow(s, i) for i in range(COUNT * STEPS)]


def loss_of(s: Setup) -> tuple[float, dict[str, float]]:
    loss, parts = s.objective.loss(s.batch, s.output, s.flow, BETA, True)
    return loss.item(), {name: value.item() for name, value in parts.items()}


def weight_of(one: Slow, kind: str, every: list[Slow]) -> float:
    if kind == "uniform":
        return 1.0
    return one.variance / (sum(other.variance for other in every[:STEPS]) / STEPS)


def slow_leave_one_out(values: list[float], size: int) -> list[float]:
    found = []
    for start in range(0, len(values), size):
        group = values[start : start + size]
        baseline = [(sum(group) - a) / (size - 1) for a in group]
        deviation = [a - b for a, b in zip(group, baseline, strict=True)]
        for i, d in enumerate(deviation):
            variance = sum(other**2 for j, other in enumerate(deviation) if j != i) / (size - 1)
            found.append(max(-5.0, min(5.0, d / (math.sqrt(variance) + 1e-8))))
    return found


def slow_clipped(log_ratio: float, advantage: float, clip: float) -> float:
    ratio = math.exp(log_ratio)
    return max(-advantage * ratio, -advantage * min(1 + clip, max(1 - clip, ratio)))


FADES = {"none": lambda abar: 1.0, "sqrt_abar": math.sqrt, "abar": float}


@pytest.mark.parametrize(
    ("reduction", "weight", "decay"),
    [("sum", "uniform", "none"), ("sum", "variance", "abar"), ("mean", "uniform", "sqrt_abar"),
     ("mean", "variance", "none")],
)  # fmt: skip
def test_dag_db(reduction, weight, decay):
    s = setup("dag_db", log_prob_reduction=reduction, transition_weight=weight, forward_looking_decay=decay)
    every, dimensions = slow(s), 1 if reduction == "sum" else D
    squares = [one.delta(BETA, dimensions, FADES[decay]) ** 2 for one in every]
    weighted = [weight_of(one, weight, every) * square for one, square in zip(every, squares, strict=True)]
    assert loss_of(s)[0] == pytest.approx(sum(weighted) / len(every), **close)
    # A flow-only fit: the same residual at the rollout's log p_F, and no weights.
    shifts = [(one.log_pf_old - one.log_pf()) / dimensions for one in every]
    deltas = [one.delta(BETA, dimensions, FADES[decay]) + shift for one, shift in zip(every, shifts, strict=True)]
    found = s.objective.flow_loss(s.batch, s.flow, BETA).item()
    assert found == pytest.approx(sum(delta**2 for delta in deltas) / len(every), **close)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_dag_kl(reduction):
    clip = 0.02 if reduction == "sum" else 0.02 / D
    s = setup("dag_kl", log_prob_reduction=reduction, group_size=5, clip_range=clip, beta=3.0)
    every, dimensions = slow(s), 1 if reduction == "sum" else D
    delta = [one.delta(BETA, dimensions) for one in every]
    advantage = slow_leave_one_out([-d for d in delta], 5)
    log_ratio = [(one.log_pf() - one.log_pf_old) / dimensions for one in every]
    policy = sum(slow_clipped(r, a, clip) for r, a in zip(log_ratio, advantage, strict=True)) / len(every)
    loss, parts = loss_of(s)
    outside = sum(abs(math.exp(r) - 1) > clip for r in log_ratio) / len(every)
    assert 0 < outside < 1
    assert parts["clipped"] == pytest.approx(outside)
    assert parts["policy_loss"] == pytest.approx(policy, **close)
    assert loss == pytest.approx(sum(d**2 for d in delta) / len(every) + 3.0 * policy, **close)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ddpo(reduction):
    s = setup("ddpo", log_prob_reduction=reduction, clip_range=0.02)
    every, dimensions = slow(s), 1 if reduction == "sum" else D
    rewards = [every[i * STEPS].end for i in range(COUNT)]
    mean = sum(rewards) / COUNT
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / COUNT)
    expected = 0.0
    for one in every:
        advantage = (one.end - mean) / (deviation + 1e-8)
        expected += slow_clipped((one.log_pf() - one.log_pf_old) / dimensions, advantage, 0.02) / len(every)
    assert loss_of(s)[0] == pytest.approx(expected, **close)


@pytest.mark.parametrize("setting", ["corrected", "faithful"])
@pytest.mark.parametrize(
    ("kind", "strength"), [("nabla_db", 1.0), ("residual_nabla_db", 1.0), ("residual_nabla_db", 0.6)]
)
def test_nabla_db(kind, strength, setting):
    s = setup(
        kind, setting=setting, pretrained_strength=strength, transition_weight="uniform", forward_looking="base",
        reverse_weight=0.7, flow_start="zero",
    )  # fmt: skip
    forward = reverse = terminal = 0.0
    every = slow(s)
    for one in every:
        parts = one.nabla(kind == "residual_nabla_db", strength, setting == "faithful")
        forward += parts[0] / len(every)
        reverse += (0.0 if setting == "faithful" and one.terminal else parts[1]) / len(every)
        terminal += parts[2] / len(every)
    loss, found = loss_of(s)
    assert found["forward_loss"] == pytest.approx(forward, **close)
    assert found["reverse_loss"] == pytest.approx(reverse, **close)
    assert loss == pytest.approx(forward + 0.7 * reverse + terminal, **close)


def test_no_flow_is_the_forward_loss_without_h():
    s = setup("residual_nabla_db_no_flow", transition_weight="uniform", forward_looking_decay="none")
    every, expected = slow(s), 0.0
    for one in every:
        for x, y, gradient_next in zip(one.x, one.y, one.gradient_next, strict=True):
            score, reference = (-(y - one.mean(x, out)) / one.variance for out in (one.policy(x)[0], REFERENCE * x))
            g_next = BETA * gradient_next * one.clean_slope(y, one.next, one.t_next == 0)
            expected += (score - reference - g_next) ** 2 / D / len(every)
    assert loss_of(s)[0] == pytest.approx(expected, **close)


def test_leave_one_out_is_the_slow_one_and_clips():
    values = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values[3] = 40.0
    found = leave_one_out(values, 8)
    torch.testing.assert_close(found, torch.tensor(slow_leave_one_out(values.tolist(), 8), dtype=torch.float64),
                               rtol=1e-10, atol=1e-10)  # fmt: skip
    assert found[3] == 5.0
    for size in (1, 7):
        with pytest.raises(ValueError, match="groups"):
            leave_one_out(values, size)


def test_a_prompt_with_sixteen_rewards_is_judged_by_its_own():
    history = {}
    for epoch in range(4):
        rewards = [float(i + 10 * epoch) for i in range(4)] + [100.0] * 4
        prompts = ("a",) * 4 + ("b",) * 4
        found = advantages(prompts, rewards, history)
    assert len(history["a"]) == 16
    own = torch.tensor(history["a"], dtype=torch.float64)
    expected = (own[-4:] - own.mean()) / (own.std(correction=0) + 1e-6)
    assert found[:4].tolist() == pytest.approx(expected.tolist())
    assert found[4:].tolist() == [0.0] * 4
    assert advantages(prompts, rewards, {}).tolist() == advantages(prompts, rewards, None).tolist()
