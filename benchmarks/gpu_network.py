"""Correctness on a device: the embedded model against itself in float64, and its policy against its own sampler's.

Parts of benchmarks/gpu.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_checks import CPU, GRADIENT, STEPS, exactly
from benchmarks.gpu_worker import Day
from diffusion import lora
from diffusion.base_model import BaseModel
from diffusion.rollout import Sampler
from diffusion.trajectory import Scores
from learner import build
from learner.config import ROOT, load_config
from learner.experience import Experience
from learner.protocol.chunks import training_chunks

EMBEDDED = str(ROOT / "models/shapes")
RATIO = 0.05  # of a float32 policy with itself in other batches; measured on a CPU: 5e-3


def network(day: Day) -> None:
    """The embedded model's guided output, and the gradient of its LoRA, against the same network in float64."""
    exactly()
    exact = output_and_gradient(CPU, torch.float64)
    for name, setting in (("float32", False), ("TF32", True)):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = setting
        found = output_and_gradient(day.device, torch.float32)
        apart = [((one - other).norm() / other.norm()).item() for one, other in zip(found, exact, strict=True)]
        for what, value in zip(("output", "gradient"), apart, strict=True):
            if setting:
                day.tell(**{f"{what} in TF32": value})
            else:
                day.check(f"{what} in {name}", value, GRADIENT)
    exactly()
    found = output_and_gradient(day.device, torch.bfloat16)
    apart = [((one - other).norm() / other.norm()).item() for one, other in zip(found, exact, strict=True)]
    day.tell(**dict(zip(("output in bfloat16", "gradient in bfloat16"), apart, strict=True)))


def output_and_gradient(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    model = BaseModel(EMBEDDED, str(device), dtype)
    model.attach_lora(rank=4, alpha=4, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in lora.named(model.unet):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(device))
    x, t = torch.randn(2, *model.latent_shape, generator=generator).to(device), torch.tensor([500, 20], device=device)
    output, _ = model.predict(x, t, model.embed(["a red circle", "a blue star"]), 3.0)
    output.square().mean().backward()
    gradient = torch.cat([parameter.grad.flatten() for _, parameter in lora.named(model.unet)])  # type: ignore[union-attr]
    return output.detach().double().cpu(), gradient.double().cpu()


def ratios(day: Day) -> None:
    """p_F of the learner over p_F of the sampler, of the same weights and before any update: 1, but for the numbers'
    precision and other batches. An objective with a clip is blind to what exceeds it."""
    exactly()
    for dtype in ("float32", "bfloat16"):
        steps = 4 if day.tiny else STEPS
        config = load_config(
            None,
            [
                f"model.dtype={dtype}", f"model.device={day.device.type}", f"sampler.steps={steps}",
                "sampler.chunk_size=8", "train.trajectories=8", "prompts.per_prompt=8", "train.updates_per_epoch=1",
                "evaluation.images=0", "run.runner=inprocess", "objective.kind=ddpo", "flow.fit_steps=0",
                "flow.warmup_steps=0", "objective.last_transition=train",
            ],
        )  # fmt: skip
        learner = build.build_learner(config)
        chunk = training_chunks(config, ["a red circle"], 0)[0]
        sampler = Sampler(learner.model, config.rollout_settings())
        made, _ = sampler.sample(chunk, learner.published)
        rewards = np.zeros((len(chunk.prompts), steps + 1), np.float32)
        experience = Experience(made, Scores(chunk, rewards))
        apart = []
        with torch.no_grad():
            for part in np.array_split(np.arange(len(experience)), max(1, len(experience) // 6)):
                batch = experience.gather(part, learner.model, config)
                log_pf = learner.kernel.log_pf(learner.policy.output(batch), batch.t, batch.x, batch.x_next, "sum")
                apart.append((log_pf - batch.log_pf_old).double().cpu())
        nats = torch.cat(apart)
        deviation = (nats.exp() - 1).abs()
        if dtype == "float32":
            day.check("float32: ratio less 1", deviation.max().item(), RATIO)
        else:
            day.check("bfloat16: transitions without a ratio", float((~nats.isfinite()).sum()), 0)
            outside = (deviation > config.objective.clip_range * batch.x[0].numel()).double().mean()
            day.tell(**{"bfloat16: share outside the clip": outside.item()})
        day.tell(
            **{f"{dtype}: ratio less 1": {"largest": deviation.max().item(), "mean": deviation.mean().item()}},
            **{f"{dtype}: largest nats": nats.abs().max().item(), "dimensions": batch.x[0].numel()},
        )
