"""Every setting of diffusers' schedulers: followed as diffusers' own step has it, without effect for a reason, or
refused in a line that names it. A field that a new diffusers adds fails the first test until it has a row."""

import inspect
import json

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)

from diffusion.base_model import load_kernel
from diffusion.kernels import DDIMKernel
from diffusion.locate import BaseModelError

STEPS = 20
ROUNDING = 1e-3  # of the noise that diffusers finds in a clean prediction at timestep 1: 1 - abar is 1e-4 in float32
BASE = {"timestep_spacing": "leading", "steps_offset": 1}
UNCLIPPED = {**BASE, "clip_sample": False}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
BETAS = torch.linspace(1e-3, 0.03, 1000).tolist()


class Refused(str):
    """What the line says."""


FOLLOWED = None
OF_THRESHOLDING = "a setting of thresholding, which is refused"
WHICH_SAMPLER = "says which sampler is run; it is always DDIM's step, or first-order SDE-DPM-Solver++'s, the same one"
NOISE = [  # of all three
    ({"num_train_timesteps": 500}, FOLLOWED),
    ({"beta_start": 1e-3}, FOLLOWED),
    ({"beta_end": 0.03}, FOLLOWED),
    ({"beta_schedule": "scaled_linear"}, FOLLOWED),
    ({"beta_schedule": "squaredcos_cap_v2"}, FOLLOWED),
    ({"trained_betas": BETAS}, FOLLOWED),
    ({"prediction_type": "v_prediction"}, FOLLOWED),
    ({"prediction_type": "sample"}, FOLLOWED),
    ({"timestep_spacing": "trailing"}, FOLLOWED),
    ({**ZERO_SNR, "prediction_type": "v_prediction"}, FOLLOWED),
    (ZERO_SNR, Refused("no signal is left")),
    ({"thresholding": True}, Refused("its thresholding is True")),
    ({"dynamic_thresholding_ratio": 0.9}, OF_THRESHOLDING),
    ({"sample_max_value": 3.0}, OF_THRESHOLDING),
]
DDIM = [
    *NOISE,
    ({"clip_sample": True}, FOLLOWED),
    ({"clip_sample": True, "clip_sample_range": 0.3}, FOLLOWED),
    ({"clip_sample_range": 0.3}, "nothing is clipped"),
    ({"steps_offset": 0}, "1 stands in: at timestep 0 nothing would be left to denoise"),
    ({"steps_offset": 3}, Refused("its steps_offset is 3")),
    ({"timestep_spacing": "linspace"}, Refused("its timestep_spacing is linspace")),
    ({"timestep_spacing": "trailing", "num_train_timesteps": 990}, Refused("its timestep_spacing is trailing")),
]
TABLE = {
    DDIMScheduler: [*DDIM, ({"set_alpha_to_one": True}, "the last transition goes to timestep 0, to have a density")],
    DDPMScheduler: [
        *DDIM,
        ({"beta_schedule": "sigmoid"}, Refused("beta_schedule is 'sigmoid'")),
        ({"variance_type": "fixed_large"}, "sampler.eta says the variance; at 1 it is fixed_small"),
        ({"variance_type": "learned"}, Refused("variance_type")),
        ({"variance_type": "learned_range"}, Refused("variance_type")),
    ],
    DPMSolverMultistepScheduler: [  # with sampler.grid=dpm_solver, in a pipeline with text
        *NOISE,
        ({"timestep_spacing": "linspace"}, FOLLOWED),
        ({"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}, FOLLOWED),
        ({"steps_offset": 0}, "StableDiffusionPipeline itself sets it to 1"),
        ({"prediction_type": "flow_prediction"}, Refused("its prediction_type is 'flow_prediction'")),
        ({"variance_type": "learned_range"}, Refused("variance_type")),
        *[
            ({name: True}, Refused(f"its {name} is True"))
            for name in ("use_karras_sigmas", "use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting")
        ],
        ({"use_exponential_sigmas": True}, Refused("its use_exponential_sigmas is True")),
        ({"use_beta_sigmas": True}, Refused("its use_beta_sigmas is True")),
        ({"flow_shift": 3.0}, "a setting of use_flow_sigmas, which is refused"),
        ({"time_shift_type": "exponential"}, "a setting of use_dynamic_shifting, which is refused"),
        ({"solver_order": 1}, WHICH_SAMPLER),
        ({"algorithm_type": "sde-dpmsolver++"}, WHICH_SAMPLER),
        ({"solver_type": "heun"}, WHICH_SAMPLER),
        ({"lower_order_final": False}, WHICH_SAMPLER),
        ({"euler_at_final": True}, WHICH_SAMPLER),
        ({"final_sigmas_type": "sigma_min"}, "the last transition goes to timestep 0, to have a density"),
    ],
}
ROWS = [
    pytest.param(kind, changes, outcome, id=f"{kind.__name__.removesuffix('Scheduler')}-{'-'.join(changes)}")
    for kind, rows in TABLE.items()
    for changes, outcome in rows
]


@pytest.mark.parametrize("kind", TABLE)
def test_every_setting_has_a_row(kind):
    fields = set(inspect.signature(kind.__init__).parameters) - {"self"}
    assert {name for changes, _ in TABLE[kind] for name in changes} == fields


def kernel_of(folder, scheduler, grid="ddim", steps=STEPS):
    """As a run would have it, from the pipeline's files."""
    scheduler.save_pretrained(folder / "scheduler")
    pipeline = "StableDiffusionPipeline" if grid == "dpm_solver" else "DDPMPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return load_kernel(str(folder), steps, 1.0, grid)


def steps_of(kernel):
    """At each timestep of the grid: (t, x, model output, noise), twice as wide as a picture."""
    generator = torch.Generator().manual_seed(0)
    for t in kernel.timesteps:
        yield t, *(2 * torch.randn(3, 1, 2, 4, 4, generator=generator)).unbind()


def diffusers_own(scheduler):
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        settings = {"algorithm_type": "sde-dpmsolver++", "solver_order": 1, "final_sigmas_type": "sigma_min"}
        own = DPMSolverMultistepScheduler.from_config(scheduler.config, steps_offset=1, **settings)
    else:
        own = DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=False, steps_offset=1)
    own.set_timesteps(STEPS)
    return own


@pytest.mark.parametrize(("kind", "changes", "outcome"), ROWS)
def test_each_is_followed_has_no_effect_or_is_refused_by_name(kind, changes, outcome, tmp_path):
    solver = kind is DPMSolverMultistepScheduler
    usual, grid = (BASE, "dpm_solver") if solver else (UNCLIPPED, "ddim")
    scheduler = kind(**{**usual, **changes})
    if isinstance(outcome, Refused):
        with pytest.raises(BaseModelError, match=outcome) as caught:
            kernel_of(tmp_path, scheduler, grid)
        said = str(caught.value)
        assert said.startswith("model.path: ") and str(tmp_path) in said and "\n" not in said
        return
    kernel, plain = kernel_of(tmp_path, scheduler, grid), kernel_of(tmp_path, kind(**usual), grid)
    drawn = torch.stack([kernel.sample(output, t.expand(1), x, noise) for t, x, output, noise in steps_of(kernel)])
    same = torch.stack([plain.sample(output, t.expand(1), x, noise) for t, x, output, noise in steps_of(plain)])
    assert torch.equal(drawn, same) == (outcome is not FOLLOWED)
    if outcome is not FOLLOWED:
        return
    own = diffusers_own(scheduler)
    assert own.timesteps.tolist() == kernel.timesteps.tolist()
    for (t, x, output, noise), ours in zip(steps_of(kernel), drawn, strict=True):
        with_eta = {} if solver else {"eta": 1.0}
        theirs = own.step(output, t, x, variance_noise=noise, **with_eta).prev_sample
        close = ROUNDING if scheduler.config.prediction_type == "sample" else 2e-5
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close * float(theirs.abs().max()))


def test_no_setting_of_a_flow_model_is_read_as_ddim(tmp_path):
    with pytest.raises(BaseModelError, match="FlowMatchEulerDiscreteScheduler, a scheduler that DDIM cannot stand in"):
        kernel_of(tmp_path, FlowMatchEulerDiscreteScheduler(shift=3.0))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_clipping_and_its_gradient_are_diffusers_own(kind, tmp_path):
    """Clean prediction and next state, and the gradients of both to model output and state."""
    settings = {**UNCLIPPED, "clip_sample": True, "clip_sample_range": 0.8, "prediction_type": kind}
    scheduler = DDIMScheduler(**settings)
    kernel, own, clipped = kernel_of(tmp_path, scheduler), diffusers_own(scheduler), []
    for t, x, output, noise in steps_of(kernel):
        inputs = [each.double().requires_grad_() for each in (output, x)]
        theirs = own.step(inputs[0], t, inputs[1], eta=1.0, variance_noise=noise.double())
        here = (inputs[0], t.expand(1), inputs[1])
        for ours, their in (
            (kernel.clean(*here), theirs.pred_original_sample),
            (kernel.sample(*here, noise.double()), theirs.prev_sample),
        ):
            close = ROUNDING if kind == "sample" else 1e-5
            torch.testing.assert_close(ours, their, rtol=close, atol=close)
            for own_gradient, their_gradient in zip(
                *(torch.autograd.grad(each.square().sum(), inputs, retain_graph=True, allow_unused=True,
                                      materialize_grads=True) for each in (ours, their)),
                strict=True,
            ):  # fmt: skip
                torch.testing.assert_close(own_gradient, their_gradient, rtol=10 * close, atol=close)
        clipped.append((kernel.clean(*here).abs() == 0.8).double().mean().item())
    assert 0.3 < sum(clipped) / len(clipped) < 1


@pytest.mark.parametrize(
    ("scheduler", "grid", "said"),
    [
        (DPMSolverMultistepScheduler(lambda_min_clipped=-5.1, **BASE), "ddim", "lambda_min_clipped .*grid=dpm_solver"),
        (
            DPMSolverMultistepScheduler(timestep_spacing="linspace"),
            "ddim",
            "timestep_spacing is linspace.*grid=dpm_solver",
        ),
        (DDIMScheduler(clip_sample=True), "dpm_solver", "clip_sample is true.*grid=ddim"),
    ],
)
def test_what_one_grid_cannot_follow_names_the_other(scheduler, grid, said):
    with pytest.raises(ValueError, match=said):
        DDIMKernel.from_scheduler(scheduler, STEPS, 1.0, grid)


def test_a_pipeline_with_text_never_clips_as_stable_diffusion_itself(tmp_path):
    """What PNDM's file leaves out is not DDIM's default there."""
    scheduler = DDIMScheduler(clip_sample=True, steps_offset=4)
    scheduler.save_pretrained(tmp_path / "scheduler")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "safety_checker", "feature_extractor"))
    own = StableDiffusionPipeline(**parts, scheduler=scheduler, requires_safety_checker=False).scheduler.config
    kernel = load_kernel(str(tmp_path), STEPS, 1.0)
    assert own.clip_sample is False and kernel.clip is None
    assert own.steps_offset == kernel.timesteps[-1] == 1
