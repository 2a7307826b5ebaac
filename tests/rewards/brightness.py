"""Scoring made plain: latents that are images, whose brightness is the reward."""

import numpy as np

from diffusion.trajectory import Chunk, CleanPredictions
from rewards.scorer import Scorer

VALUES = (0.1, 0.2, 0.3, 0.4, 0.5)


class Brightness:
    name, differentiable = "brightness", False

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


def clean(values=VALUES, purpose="train") -> CleanPredictions:
    """Two trajectories of two steps; the second's middle state is not scored. Every pixel of a latent has its value."""
    chunk = Chunk(0, purpose, 4, 0, ("first", "second"), (10, 11))
    return CleanPredictions(chunk, 2, latents(values), np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 2]), 2)


def latents(values) -> np.ndarray:
    return np.stack([np.full((3, 2, 2), value, np.float32) for value in values])


def scorer(reward=None, **options) -> Scorer:
    return Scorer(lambda latents: latents, reward or Brightness(), **options)
