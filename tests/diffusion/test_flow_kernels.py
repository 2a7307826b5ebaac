"""The kernels of flow matching against slow float64 loops written from the formulas, diffusers' own Euler step, and a
mixture whose velocity is known."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusion.flow_kernels import FlowGRPOKernel, FlowKernel
from diffusion.kernels import DDIMKernel, GaussianKernel

FLUX = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096, "shift": 3.0,
}  # fmt: skip


def grid(count: int, shift: float = 1.0) -> torch.Tensor:
    even = torch.linspace(1, 1 / count, count, dtype=torch.float64)
    return shift * even / (1 + (shift - 1) * even)


def batch(kernel: GaussianKernel, seed: int = 0):
    """One transition at every step of the grid, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (kernel.num_steps, 2, 3, 3)
    x, x_next, output = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return kernel.timesteps, x, x_next, output


def log_normal(y: float, mean: float, variance: float) -> float:
    return -((y - mean) ** 2) / (2 * variance) - 0.5 * math.log(variance) - 0.5 * math.log(2 * math.pi)


def slow_step(t: float, s: float, x: float, v: float, eta: float, spread: float):
    """One number's (xhat, mu, sigma_F^2, A, nu) in plain Python floats."""
    a = (1 - t) / (1 - s)
    nu = t * t - a * a * s * s
    posterior = s * s * nu / (t * t)
    clean, noise = x - t * v, x + (1 - t) * v
    mean = (1 - s) * clean + math.sqrt(s * s - eta**2 * posterior) * noise
    c = (1 - s) - a * (1 - t) * s * s / (t * t)
    return clean, mean, eta**2 * posterior + c * c * spread, a, nu


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_equals_slow_float64_loops(shift, eta, spread):
    sigmas = grid(12, shift)
    kernel = FlowKernel(sigmas, eta=eta).calibrated(torch.full((12,), spread, dtype=torch.float64))
    t, x, x_next, output = batch(kernel)
    times = [*sigmas.tolist(), 0.0]
    clean, mean, score = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(x)
    log_pf, log_pb = torch.zeros(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    for i in range(12):
        for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)).tolist():
            where = (i, *index)
            value, after = x[where].item(), x_next[where].item()
            step = slow_step(times[i], times[i + 1], value, output[where].item(), eta, spread)
            clean[where], mean[where], variance, a, nu = step
            if eta == 1:  # the closed form of the notes
                s, here = times[i + 1], times[i]
                b = a * s * s * (1 - here) / here - here * (1 - s)
                assert mean[where].item() == pytest.approx(
                    value * ((1 - s) + a * s * s / here) + output[where].item() * b, abs=1e-12
                )
            log_pb[i] += log_normal(value, a * after, nu)
            if i < 11:
                log_pf[i] += log_normal(after, mean[where].item(), variance)
                score[where] = -(after - mean[where]) / variance
                assert kernel.variance(t, torch.float64)[i].item() == pytest.approx(variance, rel=1e-10)
    assert kernel.noisy_steps == 11 and kernel.variance(t)[-1] == 0
    torch.testing.assert_close(kernel.clean(output, t, x), clean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kernel.mean(output, t, x), mean, rtol=1e-10, atol=1e-10)
    first = slice(0, 11)
    torch.testing.assert_close(kernel.log_pb(t, x, x_next, "sum"), log_pb, rtol=1e-10, atol=1e-10)
    found = kernel.log_pf(output[first], t[first], x[first], x_next[first], "sum")
    torch.testing.assert_close(found, log_pf[first], rtol=1e-10, atol=1e-10)
    found = kernel.score_pf(output[first], t[first], x[first], x_next[first])
    torch.testing.assert_close(found, score[first], rtol=1e-10, atol=1e-10)


def test_the_step_reverses_the_noising_of_a_known_image():
    """Bayes: log q(x_s|x_t, x_0) + log q(x_t|x_0) = log p_B(x_t|x_s) + log q(x_s|x_0), at every step with a density."""
    kernel = FlowKernel(grid(9, 3.0))
    t, x, x_next, image = batch(kernel)
    for i, here in enumerate(kernel.sigmas.tolist()[:-1]):
        one, s = slice(i, i + 1), kernel.sigmas[i + 1].item()
        noise = (x[one] - (1 - here) * image[one]) / here
        v = noise - image[one]
        left = kernel.log_pf(v, t[one], x[one], x_next[one], "sum") + normal(x[one], (1 - here) * image[one], here)
        right = kernel.log_pb(t[one], x[one], x_next[one], "sum") + normal(x_next[one], (1 - s) * image[one], s)
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-9)


def normal(x: torch.Tensor, mean: torch.Tensor, deviation: float) -> torch.Tensor:
    return torch.distributions.Normal(mean, deviation).log_prob(x).flatten(1).sum(1)


@pytest.mark.parametrize(
    ("settings", "more"),
    [({"shift": 1.0}, {}), ({"shift": 3.0}, {}), (FLUX, {"tokens": 1024, "sigmas": np.linspace(1.0, 0.1, 10)})],
    ids=["plain", "sd3", "flux"],
)
def test_grid_and_deterministic_step_are_those_of_diffusers_euler(settings, more):
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    kernel = FlowKernel.from_scheduler(scheduler, 10, 1e-4, **more)
    mu = {"mu": 0.5 + (1024 - 256) * (1.15 - 0.5) / (4096 - 256)} if more else {}
    scheduler.set_timesteps(10, sigmas=more.get("sigmas"), **mu)
    assert kernel.times.tolist() == scheduler.timesteps.tolist()
    t, x, _, output = batch(kernel)
    for ours in (kernel.mean(output, t, x), kernel.without_noise(output, t, x)):
        scheduler.set_timesteps(10, sigmas=more.get("sigmas"), **mu)
        for i, timestep in enumerate(scheduler.timesteps):
            theirs = scheduler.step(output[i].float(), timestep, x[i].float()).prev_sample
            torch.testing.assert_close(ours[i].float(), theirs, rtol=1e-5, atol=1e-5)


def test_with_alpha_and_sigma_of_a_diffusion_model_the_formulas_are_ddims():
    """The step's variance and p_B in terms of A and nu are those of the kernel that exists."""
    abar = torch.sigmoid(torch.linspace(2, -5, 11, dtype=torch.float64))
    kernel = DDIMKernel(abar, torch.arange(10, 0, -1))
    for step in range(10, 0, -1):
        t, s = abar[step].item(), abar[step - 1].item()
        nu = (1 - t) - t / s * (1 - s)
        where = torch.tensor([step])
        assert kernel.variance(where, torch.float64).item() == pytest.approx((1 - s) * nu / (1 - t), rel=1e-12)
        assert kernel.noise(where, torch.float64).item() == pytest.approx(1 - t, rel=1e-12)


@pytest.mark.parametrize(
    ("sigmas", "said"), [([0.5, 0.5], "must fall"), ([1.2, 0.5], "must fall"), ([0.5, 0.0], "must fall")]
)
def test_a_grid_that_is_none_is_refused(sigmas, said):
    with pytest.raises(ValueError, match=said):
        FlowKernel(torch.tensor(sigmas))


def test_settings_that_are_not_followed_are_named():
    for settings, said in (
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"stochastic_sampling": True}, "stochastic_sampling"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ):
        with pytest.raises(ValueError, match=said):
            FlowKernel.from_scheduler(FlowMatchEulerDiscreteScheduler(**settings), 10)


def test_flow_grpos_step_is_its_formula_and_has_no_noising_kernel():
    kernel = FlowGRPOKernel(grid(6), a=0.7)
    t, x, x_next, v = batch(kernel)
    times = [*kernel.sigmas.tolist(), 0.0]
    for i in range(5):
        here, dt = times[i], times[i + 1] - times[i]
        inside = times[1] if here == 1 else here
        g2 = 0.49 * inside / (1 - inside)
        mean = x[i] * (1 + g2 * dt / (2 * here)) + v[i] * (1 + g2 * (1 - here) / (2 * here)) * dt
        one = slice(i, i + 1)
        torch.testing.assert_close(kernel.mean(v[one], t[one], x[one])[0], mean, rtol=1e-12, atol=1e-12)
        assert kernel.variance(t, torch.float64)[i].item() == pytest.approx(-g2 * dt, rel=1e-12)
    with pytest.raises(TypeError, match="noising"):
        kernel.log_pb(t, x, x_next, "sum")


# --- a mixture of three Gaussians, whose velocity and densities are known

WEIGHTS, MEANS, DEVIATIONS = torch.tensor([[0.5, 0.3, 0.2], [-1.0, 0.5, 1.5], [0.15, 0.1, 0.2]], dtype=torch.float64)
GRID = torch.linspace(-5, 5, 801, dtype=torch.float64)
WIDTH = float(GRID[1] - GRID[0])


def moments(sigma: float):
    """On GRID, of x_t: log density, E[x_0|x_t], Var[x_0|x_t]."""
    alpha = 1 - sigma
    variance = alpha**2 * DEVIATIONS**2 + sigma**2
    apart = GRID[:, None] - alpha * MEANS
    logs = WEIGHTS.log() - apart.square() / (2 * variance) - variance.log() / 2 - math.log(2 * math.pi) / 2
    share = logs.softmax(1)
    means = MEANS + alpha * DEVIATIONS**2 / variance * apart
    spreads = DEVIATIONS**2 * sigma**2 / variance
    clean = (share * means).sum(1)
    return logs.logsumexp(1), clean, (share * (spreads + means.square())).sum(1) - clean.square()


def velocity(sigma: float) -> torch.Tensor:
    _, clean, _ = moments(sigma)
    return (GRID - (1 - sigma) * clean) / sigma - clean if sigma < 1 else GRID - clean


def spread(sigmas: torch.Tensor) -> torch.Tensor:
    """V_t on a grid: mean over x_t of Var[x_0|x_t]."""
    return torch.stack([(moments(s)[0].exp() * moments(s)[2]).sum() * WIDTH for s in sigmas.tolist()])


def drawn(kernel: FlowKernel) -> tuple[float, float]:
    """Total variation of the law that the kernel draws to the mixture's, and the sum over its steps with a density of
    E[detailed balance residual^2], with the marginals as flows."""
    density, residual = torch.exp(-GRID.square() / 2) / math.sqrt(2 * math.pi), 0.0
    for i, sigma in enumerate(kernel.sigmas.tolist()):
        t = kernel.timesteps[i : i + 1].expand(len(GRID))
        shaped, v = GRID.reshape(-1, 1, 1, 1), velocity(sigma).reshape(-1, 1, 1, 1)
        if i == kernel.noisy_steps:
            density = pushed(density, kernel.without_noise(v, t, shaped).flatten())
            break
        mean, variance = kernel.mean(v, t, shaped).flatten(), kernel.variance(t[:1], torch.float64)
        log_pf = -(GRID[None] - mean[:, None]).square() / (2 * variance) - (2 * math.pi * variance).log() / 2
        s = kernel.sigmas[i + 1].item()
        if not isinstance(kernel, FlowGRPOKernel):
            a = (1 - sigma) / (1 - s)
            nu = torch.tensor(sigma**2 - a**2 * s**2)
            log_pb = -(GRID[:, None] - a * GRID[None]).square() / (2 * nu) - (2 * math.pi * nu).log() / 2
            marginal = moments(sigma)[0]
            delta = marginal[:, None] + log_pf - moments(s)[0][None] - log_pb
            residual += float((marginal.exp()[:, None] * log_pf.exp() * delta.square()).sum()) * WIDTH**2
        density = (density[:, None] * log_pf.exp()).sum(0) * WIDTH
    return 0.5 * float((density - moments(0.0)[0].exp()).abs().sum()) * WIDTH, residual


def pushed(density: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """Of a deterministic, increasing map."""
    slope = torch.gradient(to, spacing=WIDTH)[0]
    return torch.from_numpy(np.interp(GRID.numpy(), to.numpy(), (density / slope).numpy(), left=0, right=0))


def test_the_calibrated_variance_draws_the_data_best_and_alone_is_nearly_in_balance():
    """With the exact velocity, by quadrature."""
    found = {}
    for count in (10, 20, 40):
        sigmas = grid(count)
        plain = FlowKernel(sigmas)
        found[count] = [drawn(kernel) for kernel in (plain, plain.calibrated(spread(sigmas)), FlowGRPOKernel(sigmas))]
        plain, calibrated, _ = found[count]
        assert calibrated[0] < 0.4 * plain[0] and calibrated[1] < plain[1]
    assert found[20][1][0] == pytest.approx(0.031, abs=0.005)
    # Only its residual falls with the number of steps: .63, .23, .11 against .82, .71, .81.
    assert found[10][1][1] > 2 * found[20][1][1] > 3.5 * found[40][1][1]
    assert found[40][0][1] > found[20][0][1]
