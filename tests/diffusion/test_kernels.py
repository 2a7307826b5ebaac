"""The kernels against slow float64 loops written from the papers' formulas, and against diffusers' own DDIM."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler

from diffusion.kernels import DDIMKernel

SD15 = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1,
    "set_alpha_to_one": False, "clip_sample": False,
}  # fmt: skip
SHAPES = {
    "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing", "steps_offset": 1,
    "set_alpha_to_one": False, "clip_sample": False,
}  # fmt: skip


def batch(kernel: DDIMKernel, seed: int = 0):
    """One transition at every step of the grid, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (kernel.num_steps, 2, 3, 3)
    x, x_next, output = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return kernel.timesteps, x, x_next, output


def slow_step(abar: list[float], t: int, t_next: int, kind: str, x: float, output: float, eta: float):
    """One number's (xhat, mu, sigma^2, a^2) from objectives, section 0, in plain Python floats."""
    a, b = abar[t], abar[t_next]
    if kind == "epsilon":
        eps = output
        clean = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    elif kind == "v_prediction":
        clean = math.sqrt(a) * x - math.sqrt(1 - a) * output
        eps = math.sqrt(a) * output + math.sqrt(1 - a) * x
    else:
        clean = output
        eps = (x - math.sqrt(a) * output) / math.sqrt(1 - a)
    variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
    mean = math.sqrt(b) * clean + math.sqrt(1 - b - variance) * eps
    return clean, mean, variance, a / b


def log_normal(y: float, mean: float, variance: float) -> float:
    return -((y - mean) ** 2) / (2 * variance) - 0.5 * math.log(variance) - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("settings", [SD15, SHAPES], ids=["sd15", "shapes"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_equals_slow_float64_loops(settings, kind, eta):
    scheduler = DDIMScheduler(**settings, prediction_type=kind)
    kernel = DDIMKernel.from_scheduler(scheduler, 20, eta)
    t, x, x_next, output = batch(kernel)
    abar = scheduler.alphas_cumprod.double().tolist()
    grid = [*t.tolist(), 0]
    clean, mean = torch.empty_like(x), torch.empty_like(x)
    log_pf, log_pb = torch.zeros(len(t), dtype=torch.float64), torch.zeros(len(t), dtype=torch.float64)
    score = torch.empty_like(x)
    for i in range(len(t)):
        for index in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)).tolist():
            where = (i, *index)
            value, after = x[where].item(), x_next[where].item()
            c, m, variance, shrink2 = slow_step(abar, grid[i], grid[i + 1], kind, value, output[where].item(), eta)
            clean[where], mean[where] = c, m
            score[where] = -(after - m) / variance
            log_pf[i] += log_normal(after, m, variance)
            log_pb[i] += log_normal(value, math.sqrt(shrink2) * after, 1 - shrink2)
            assert kernel.variance(t)[i].item() == pytest.approx(variance, rel=1e-6)
    torch.testing.assert_close(kernel.clean(output, t, x), clean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kernel.mean(output, t, x), mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kernel.score_pf(output, t, x, x_next), score, rtol=1e-10, atol=1e-10)
    for reduction, dimensions in (("sum", 1), ("mean", 18)):
        ours = kernel.log_pf(output, t, x, x_next, reduction)
        torch.testing.assert_close(ours, log_pf / dimensions, rtol=1e-10, atol=1e-10)
        ours = kernel.log_pb(t, x, x_next, reduction)
        torch.testing.assert_close(ours, log_pb / dimensions, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", [SD15, SHAPES], ids=["sd15", "shapes"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_sampling_equals_diffusers_ddim(settings, kind):
    scheduler = DDIMScheduler(**settings, prediction_type=kind)
    kernel = DDIMKernel.from_scheduler(scheduler, 50)
    t, x, noise, output = batch(kernel)
    ours = kernel.sample(output, t, x, noise)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == t.tolist()
    for i, timestep in enumerate(t):
        theirs = scheduler.step(output[i], timestep, x[i], eta=1.0, variance_noise=noise[i]).prev_sample
        torch.testing.assert_close(ours[i], theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [SD15, SHAPES, SHAPES | {"clip_sample": True}], ids=["sd15", "shapes", "clipped"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_a_step_without_noise_is_diffusers_ddim_with_eta_0_whatever_the_kernels_eta(settings, eta):
    scheduler = DDIMScheduler(**settings)
    kernel = DDIMKernel.from_scheduler(scheduler, 20, eta)
    t, x, _, output = batch(kernel)
    ours = kernel.without_noise(output, t, x)
    scheduler.set_timesteps(20)
    for i, timestep in enumerate(t):
        theirs = scheduler.step(output[i], timestep, x[i], eta=0.0).prev_sample
        torch.testing.assert_close(ours[i], theirs, rtol=1e-5, atol=1e-6)


def test_the_divergence_of_two_outputs_is_that_of_their_normal_laws():
    scheduler = DDIMScheduler(**SHAPES)
    kernel = DDIMKernel.from_scheduler(scheduler, 20, 0.7)
    t, x, reference, output = batch(kernel)
    abar, grid = scheduler.alphas_cumprod.double().tolist(), [*kernel.timesteps.tolist(), 0]
    for i, found in enumerate(kernel.divergence(output, reference, t, x).tolist()):
        numbers = zip(*(values[i].flatten().tolist() for values in (x, output, reference)), strict=True)
        steps = [
            [slow_step(abar, grid[i], grid[i + 1], "epsilon", n, o, 0.7)[1:3] for o in both] for n, *both in numbers
        ]
        expected = sum((ours - theirs) ** 2 / (2 * variance) for (ours, variance), (theirs, _) in steps)
        assert found == pytest.approx(expected, rel=1e-9)
    assert (kernel.divergence(output, output, t, x) == 0).all()


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(**{key: value for key, value in SD15.items() if key != "clip_sample"}, skip_prk_steps=True),
        # Discrepancy 4: going to abar = 1 would make sigma 0 and log p_F infinite.
        DDIMScheduler(**SD15 | {"set_alpha_to_one": True}),
        # As DDPM pipelines come: leading spacing without offset would evaluate the model at timestep 0.
        DDIMScheduler(**SD15 | {"steps_offset": 0}),
    ],
    ids=["pndm, as shipped", "set_alpha_to_one", "no offset"],
)
def test_other_settings_give_the_ddim_grid_to_timestep_zero(scheduler):
    kernel = DDIMKernel.from_scheduler(scheduler, 50)
    expected = DDIMKernel.from_scheduler(DDIMScheduler(**SD15), 50)
    assert kernel.timesteps.tolist() == expected.timesteps.tolist()
    assert torch.equal(kernel.variance(kernel.timesteps), expected.variance(kernel.timesteps))


def test_half_precision_inputs_are_computed_in_float32():
    kernel = DDIMKernel.from_scheduler(DDIMScheduler(**SD15), 50)
    t, x, x_next, output = batch(kernel)
    low = [value.bfloat16() for value in (output, x, x_next)]
    got = kernel.log_pf(low[0], t, low[1], low[2], "mean")
    exact = kernel.log_pf(low[0].double(), t, low[1].double(), low[2].double(), "mean")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


def test_refuses_what_has_no_density():
    scheduler = DDIMScheduler(**SD15)
    for change, message in (
        ({"eta": 0.0}, "eta"),
        ({"eta": 1.5}, "at most 1"),
        ({"num_steps": 1001}, "num_inference_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            DDIMKernel.from_scheduler(scheduler, **change)
    for grid, message in (([900, 400, 0], "timestep 0"), ([400, 400, 1], "must decrease")):
        with pytest.raises(ValueError, match=message):
            DDIMKernel(scheduler.alphas_cumprod, torch.tensor(grid))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_the_dpm_solver_grid_is_first_order_sde_dpm_solver(spacing):
    """Every step of diffusers' own sde-dpmsolver++ of order 1, given our noise, is our DDIM step with eta 1."""
    settings = {**SD15, "timestep_spacing": spacing}
    kernel = DDIMKernel.from_scheduler(DDIMScheduler(**settings), 20, grid="dpm_solver")
    own = DPMSolverMultistepScheduler.from_config(
        DDIMScheduler(**settings).config, algorithm_type="sde-dpmsolver++", solver_order=1,
        final_sigmas_type="sigma_min",
    )  # fmt: skip
    own.set_timesteps(20)
    assert kernel.timesteps.tolist() == own.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    for step in own.timesteps:
        output, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
        t = step.expand(3)
        ours = kernel.sample(output, t, x, noise)
        theirs = own.step(output, step, x, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5 * float(theirs.abs().max()))
        x = theirs


def test_the_reverse_of_a_step_knows_nothing_of_the_image_at_eta_1_alone():
    """q(x_t | x_t', x_0) by Bayes from DDIM's q(x_t' | x_t, x_0) and q(x_t | x_0): a normal law around k x_t' + m x_0.
    At eta 1 m is 0 and the law is p_B; below, a noising kernel would have to know the image."""
    scheduler = DDIMScheduler(**SD15)
    for eta in (1.0, 0.5):
        kernel = DDIMKernel.from_scheduler(scheduler, 20, eta)
        t = kernel.timesteps
        a, b = (scheduler.alphas_cumprod.double()[times] for times in (t, torch.cat([t[1:], t.new_zeros(1)])))
        kept = (1 - b - kernel.variance(t, torch.float64)).sqrt()  # of x_t's noise in x_t'
        k = (1 - a).sqrt() * kept / (1 - b)
        m, variance = a.sqrt() - k * b.sqrt(), (1 - a) - k**2 * (1 - b)
        if eta < 1:
            assert m.abs().min() > 1e-3
            continue
        assert m.abs().max() < 1e-6
        x, x_next = (state[:, :1, :1, :1] for state in batch(kernel)[1:3])
        numbers = zip(x.flatten().tolist(), (k * x_next.flatten()).tolist(), variance.tolist(), strict=True)
        assert kernel.log_pb(t, x, x_next, "sum").tolist() == pytest.approx([log_normal(*each) for each in numbers])
