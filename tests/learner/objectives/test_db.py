"""DAG-DB: the vectorised residual and loss against a slow loop over transitions, in float64."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from diffusion.kernels import DDIMKernel
from learner.objectives import db
from learner.objectives.base import anneal, gamma, transition_weights

STEPS, BETA = 5, 7.0


def problem():
    """Three trajectories of five transitions of [2, 2, 2] states, with outputs, flows and rewards at random."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scheduler = DDIMScheduler(
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing", steps_offset=1,
        set_alpha_to_one=False, prediction_type="v_prediction",
    )  # fmt: skip
    kernel = DDIMKernel.from_scheduler(scheduler, STEPS)
    abar = scheduler.alphas_cumprod.double().tolist()
    return kernel, abar, draw(3, STEPS + 1, 2, 2, 2), draw(3, STEPS, 2, 2, 2), draw(3, STEPS), draw(3, STEPS + 1)


def slow_residual(abar, grid, states, outputs, f, reward, b, i, dimensions):
    """delta of transition i of trajectory b from the definition, number by number."""
    a, nxt = abar[grid[i]], abar[grid[i + 1]]
    variance = (1 - nxt) / (1 - a) * (1 - a / nxt)
    log_pf = log_pb = 0.0
    for x, y, v in zip(states[b, i].flatten(), states[b, i + 1].flatten(), outputs[b, i].flatten(), strict=True):
        x, y, v = x.item(), y.item(), v.item()
        clean = math.sqrt(a) * x - math.sqrt(1 - a) * v
        eps = math.sqrt(a) * v + math.sqrt(1 - a) * x
        mean = math.sqrt(nxt) * clean + math.sqrt(1 - nxt - variance) * eps
        log_pf += -((y - mean) ** 2) / (2 * variance) - 0.5 * math.log(2 * math.pi * variance)
        back = 1 - a / nxt
        log_pb += -((x - math.sqrt(a / nxt) * y) ** 2) / (2 * back) - 0.5 * math.log(2 * math.pi * back)
    here = f[b, i].item() + BETA * reward[b, i].item()
    after = BETA * reward[b, STEPS].item()
    if i + 1 < STEPS:
        after = f[b, i + 1].item() + BETA * reward[b, i + 1].item()
    return here + (log_pf - log_pb) / dimensions - after


@pytest.mark.parametrize(("reduction", "dimensions"), [("sum", 1), ("mean", 8)])
def test_residual_and_loss_equal_slow_loops(reduction, dimensions):
    kernel, abar, states, outputs, f, reward = problem()
    grid = [*kernel.timesteps.tolist(), 0]
    slow = [
        [slow_residual(abar, grid, states, outputs, f, reward, b, i, dimensions) for i in range(STEPS)]
        for b in range(3)
    ]
    step = torch.arange(STEPS).repeat(3)
    row = torch.arange(3).repeat_interleave(STEPS)
    t = kernel.timesteps[step]
    x, x_next, output = states[row, step], states[row, step + 1], outputs[row, step]
    f_padded = torch.cat([f, torch.zeros(3, 1, dtype=f.dtype)], 1)
    delta = db.residual(
        db.log_flow(f[row, step], BETA * reward[row, step]),
        kernel.log_pf(output, t, x, x_next, reduction),
        kernel.log_pb(t, x, x_next, reduction),
        db.next_log_flow(
            f_padded[row, step + 1], BETA * reward[row, step + 1], BETA * reward[row, STEPS], step + 1 == STEPS, True
        ),
    )
    slow = torch.tensor(slow, dtype=torch.float64).flatten()
    torch.testing.assert_close(delta, slow, rtol=1e-10, atol=1e-10)
    squared = sum(value.item() ** 2 for value in slow) / len(slow)
    assert db.penalty(delta, "squared").mean().item() == pytest.approx(squared, rel=1e-10)


def test_penalty_properties():
    delta = torch.linspace(-4, 4, 81, dtype=torch.float64)
    for kind in ("squared", "huber"):
        g = db.penalty(delta, kind)
        assert (g >= 0).all() and db.penalty(torch.zeros(1), kind).item() == 0
        torch.testing.assert_close(g, g.flip(0))
    small = delta[delta.abs() <= 1]
    torch.testing.assert_close(db.penalty(small, "huber"), small.square())
    wide = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert torch.diff(db.penalty(wide, "huber", 0.5)).item() == pytest.approx(2 * 0.5)


def test_next_flow_gradient_only_when_faithful_and_never_at_the_end():
    f_next = torch.ones(2, requires_grad=True)
    terminal = torch.tensor([False, True])
    for detach, expected in ((False, [1.0, 0.0]), (True, [0.0, 0.0])):
        value = db.next_log_flow(f_next, torch.zeros(2), torch.tensor([5.0, 6.0]), terminal, detach)
        assert value[1].item() == 6.0
        gradient = torch.zeros(2)
        if value.requires_grad:
            (gradient,) = torch.autograd.grad(value.sum(), f_next)
        assert gradient.tolist() == expected


def test_annealing_is_linear_over_the_first_half():
    assert [anneal(100, epoch, 8, 0.5) for epoch in range(6)] == [0, 25, 50, 75, 100, 100]
    assert anneal(100, 0, 8, 0.0) == 100


def test_decay_fades_towards_the_noise_and_is_one_at_the_image():
    abar = torch.tensor([0.01, 0.25, 1.0])
    assert gamma(abar, "none").tolist() == [1, 1, 1]
    torch.testing.assert_close(gamma(abar, "sqrt_abar"), torch.tensor([0.1, 0.5, 1.0]))
    assert torch.equal(gamma(abar, "abar"), abar)


def test_variance_weights_average_to_one_over_the_grid():
    variance = torch.tensor([0.5, 0.1, 0.01])
    assert transition_weights(variance, variance, "variance").mean().item() == pytest.approx(1)
    assert transition_weights(variance, variance, "uniform").tolist() == [1, 1, 1]
