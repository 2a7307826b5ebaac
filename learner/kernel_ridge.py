"""Kernel ridge regression of numbers on pictures, and the gradient of what it learned.

A linear kernel and a Gaussian one of median width; each prompt has a constant of its own, and half of the rest to
itself. The ridge is chosen by exact leave-one-out error (least_squares.py), and where leaving one out cannot tell the
fit from chance, the gradient is zero."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learner import least_squares

MOST = 2048  # pictures, the newest: the solution takes their cube


class KernelRidge:
    def __init__(self, pictures: Tensor, prompts: Sequence[str], values: Tensor, known: Tensor | None = None) -> None:
        """From pictures, latents or others, [n, C, H, W], oldest first, their prompts and values [n]. Values are first
        put down to `known` numbers [n], if given, `slope` times. `explained`: the share of the rest's variance within
        prompts that is foretold of pictures left out; 0 where that may be chance."""
        self.known = pictures[-MOST:].flatten(1).double()
        self.prompts = list(prompts[-MOST:])
        self.middle = self.known.mean(0)
        self.linear = (self.known - self.middle).square().sum(1).mean().clamp(min=1e-300)
        distances = self._distances(self.known)
        self.width = distances.flatten().median().clamp(min=1e-300)
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(self.prompts))}
        constants = least_squares.columns(torch.tensor([numbers[prompt] for prompt in self.prompts]))
        flat = self.known - self.middle
        gram = (flat @ flat.T / self.linear + (-distances / self.width).exp()) * self._shared(self.prompts)
        free = constants if known is None else torch.cat([constants, known[-MOST:, None].double()], 1)
        solution = least_squares.solve(gram, values[-MOST:].double(), free)
        self.coefficients, self.explained = solution.coefficients, solution.explained
        self.slope = 0.0 if known is None else solution.free[-1].item()

    def gradient(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Of the learned part of the values to pictures [b, C, H, W], in their shape and type."""
        x = pictures.flatten(1).double().cpu()
        weights = self._shared(prompts) * self.coefficients
        near = weights * (-self._distances(x) / self.width).exp() * (2 / self.width)
        straight = weights @ (self.known - self.middle) / self.linear
        curved = near @ self.known - near.sum(1, keepdim=True) * x
        return (straight + curved).reshape(pictures.shape).to(pictures)

    def _distances(self, x: Tensor) -> Tensor:
        """Squares [b, n], from x [b, D] to the known pictures."""
        return torch.cdist(x, self.known).square()

    def _shared(self, prompts: Sequence[str]) -> Tensor:
        """[b, n]: what pictures of these prompts have in common with the known ones: all, or half of it."""
        return torch.tensor([[1.0 if one == other else 0.5 for other in self.prompts] for one in prompts]).double()
