"""exact_problem.py's G on the path of flow matching."""

import math
from dataclasses import dataclass

import torch
from exact_problem import Problem
from torch import Tensor

from diffusion.flow_kernels import FlowKernel


@dataclass(frozen=True)
class FlowProblem(Problem):
    """On the path alpha = 1 - sigma, whose last step has no density; states are labelled by the steps to the image."""

    @property
    def sigmas(self) -> Tensor:  # [N]
        return torch.linspace(1, 1 / self.steps, self.steps, dtype=torch.float64)

    def base_output(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = (t / self.steps).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        alpha = 1 - sigma
        clean = alpha * x / (alpha.square() + sigma.square())
        return (x - alpha * clean) / sigma - clean

    def kernel(self, eta: float) -> FlowKernel:
        """Calibrated: the exact reverse of p_B from N(0, 1)."""
        square = self.sigmas.square()
        return FlowKernel(self.sigmas, eta=eta).calibrated(square / (square + (1 - self.sigmas).square()))


def flow_gaussian(steps: int) -> Problem:
    """As G, of a flow model: R of the clean prediction at the last state with a density, a normal law of the base's own
    variance there."""
    sigma = 1 / steps
    variance = (1 - sigma) ** 2 + sigma**2
    factor = (1 - sigma) / variance  # the clean prediction is this times x
    scale = 0.5 * math.log(2 * math.pi * variance)
    return FlowProblem(steps, torch.zeros(0), lambda x: -((x / factor - 1) ** 2) / (2 * variance) - scale)


def flow_tilted(steps: int) -> Problem:
    return FlowProblem(steps, torch.zeros(0), lambda x: x)
