"""Transitions behind objective.window: they are not trained, but share the weights of those that are. What becomes of
them: no noise (sampler.noise=window), or held to the frozen model by their exact KL (objective.later_kl), or free."""

from collections.abc import Sequence

import numpy as np
import torch

from diffusion import gpu_memory
from diffusion.kernels import GaussianKernel
from learner.config import Config
from learner.experience import Experience
from learner.objectives.base import Policy


def steps(config: Config) -> range:
    """Those that have noise."""
    return range(config.objective.span(config.sampler.steps)[1], config.noise_steps)


def in_words(config: Config) -> str | None:
    """What becomes of them; None where there are none."""
    last, weight = config.sampler.steps - 1, config.objective.later_kl
    if (end := config.objective.span(config.sampler.steps)[1]) > last:
        return None
    where = f"transition {end} is" if end == last else f"transitions {end} to {last}, behind those trained, are"
    if not steps(config):
        return f"{where} without noise (sampler.noise=window)"
    if weight:
        return f"{where} held to the frozen model (objective.later_kl={weight:g})"
    return f"{where} free: nothing holds them (objective.later_kl, or sampler.noise=window)"


def hold(
    update: Sequence[Experience], config: Config, policy: Policy, kernel: GaussianKernel, size: int
) -> dict[str, float]:
    """Add to the gradient that of objective.later_kl times their mean KL to the frozen model, at the states of the
    update's trajectories, `size` at a time; the mean, in nats, for the log."""
    weight, later, model = config.objective.later_kl, np.array(steps(config)), policy.model
    if not weight or not len(later):
        return {}
    count = sum(len(each.trajectories.selected) for each in update) * len(later)
    total = torch.zeros((), device=model.device)
    for trajectories in [each.trajectories for each in update]:
        row, step = (each.ravel() for each in np.meshgrid(np.arange(len(trajectories.selected)), later, indexing="ij"))
        for start in range(0, len(row), size):
            rows, at = row[start : start + size], step[start : start + size]
            x = gpu_memory.to_device(trajectories.states[rows, at], model.device).float()
            t = gpu_memory.to_device(trajectories.timesteps[at], model.device)
            embeddings = model.embed([trajectories.chunk.prompts[r] for r in rows])
            with torch.no_grad():
                reference = policy.reference(x, t, embeddings)
            output, _ = model.predict(x, t, embeddings, policy.guidance)
            share = kernel.divergence(output, reference, t, x).sum() / count
            (weight * share).backward()
            total += share.detach()
    return {"later_kl": total.item()}
