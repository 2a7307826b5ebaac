"""Scoring made plain: latents that are images, whose brightness is the reward."""

import numpy as np
import pytest
import torch

from diffusion.trajectory import Chunk, CleanPredictions
from rewards.scorer import Scorer

VALUES = (0.1, 0.2, 0.3, 0.4, 0.5)


class Brightness:
    """Or what `change` makes of it."""

    name = "brightness"

    def __init__(self, change=lambda scores: scores, differentiable=False) -> None:
        self.change, self.differentiable = change, differentiable

    def __call__(self, images, prompts):
        return self.change(images.mean((1, 2, 3)))


def clean(values=VALUES, purpose="train") -> CleanPredictions:
    """Two trajectories of two steps; the second's middle state is not scored. Every pixel of a latent has its value."""
    chunk = Chunk(0, purpose, 4, 0, ("first", "second"), (10, 11))
    return CleanPredictions(chunk, 2, latents(values), np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 2]), 2)


def latents(values) -> np.ndarray:
    return np.stack([np.full((3, 2, 2), value, np.float32) for value in values])


def require_slope(reward, images, prompts, step: float, **close) -> torch.Tensor:
    """The gradient to the images, which is that of finite differences along random ways."""
    pixels = images.double().requires_grad_()
    gradient = torch.autograd.grad(reward(pixels, prompts).sum(), pixels)[0]
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        way = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        ends = (pixels.detach() + sign * step * way for sign in (1, -1))
        up, down = (reward(end.requires_grad_(), prompts).sum().item() for end in ends)
        assert (gradient * way).sum().item() == pytest.approx((up - down) / (2 * step), **close)
    return gradient


def scorer(reward=None, **options) -> Scorer:
    return Scorer(lambda latents: latents, reward or Brightness(), **options)
