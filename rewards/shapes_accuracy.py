"""Strict prompt accuracy for the shapes model: 1 where a picture shows what its prompt says, else 0. For judging; a
reward of two values is a poor one to train on (shapes_alignment is graded)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.shapes.measure import correct
from models.shapes.world import parse


class ShapesAccuracy:
    """By models/shapes/detector.py: every object with the asked colour, shape, size and place."""

    name = "shapes_accuracy"
    differentiable = False

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for the first prompt that is not of the shapes world."""
        for prompt in prompts:
            parse(prompt)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B prompts -> [B]."""
        pixels = images.detach().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor(
            [float(correct(picture, parse(prompt))) for picture, prompt in zip(pixels, prompts, strict=True)]
        )
