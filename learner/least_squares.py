"""The step of `learner.optimizer=natural`: least squares of the objective's residuals in the adapter's parameters.

A squared-residual objective is, near the present weights, a regression: residual i is e_i, moving the parameters by d
moves it by g_i . d, g_i being the gradient of what the objective makes of log p_F. With N trajectories an epoch and
more parameters than that the minimum-norm solution needs the N x N Gram matrix of the rows alone, as MinSR (arXiv
2302.01941) and SPRING (arXiv 2401.10190) do for quantum states:

    d = -S^2 G^T a,   (G S^2 G^T + ridge) a = e    beside free columns, which no ridge holds

S scales parameters to equal Fisher information; the ridge is the one whose leave-one-out error is least, which is exact
and free once the Gram matrix is factorised. There is no learning rate, and where leaving one out shows that nothing can
be told from noise, no step. Free columns are a constant for each group of rows, and what scaling the present adapter
does: ridges make every step too short, and this one number says by how much."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SURE = 2.0  # standard errors by which rows left out must gain: less is what the choice among ridges finds in noise
RIDGES = torch.logspace(-5, 5, 41, dtype=torch.float64)  # times the mean eigenvalue


@dataclass(frozen=True)
class Solution:
    """`coefficients` a [N] float64 of the rows, `free` [F] of the free columns: errors are about free columns x `free`
    + Gram matrix x `coefficients`. `explained` is the share that rows explain of what the free columns leave of the
    errors of rows left out of the fit; 0, with coefficients 0, where that cannot be told from chance."""

    coefficients: Tensor
    free: Tensor
    ridge: float
    explained: float


def columns(groups: Tensor) -> Tensor:
    """A free constant [N, G] float64 for each group of rows, [N] int64; -1: none."""
    count = int(groups.max().item()) + 1 if len(groups) else 0
    return torch.nn.functional.one_hot(groups + 1, max(count, 0) + 1)[:, 1:].double()


def without(free: Tensor, values: Tensor) -> Tensor:
    """Of values [N] or [N, M] float64 what free columns [N, F] leave."""
    q = _basis(free)
    return values - q @ (q.T @ values)


def solve(gram: Tensor, errors: Tensor, free: Tensor) -> Solution:
    """From the Gram matrix [N, N] of the scaled rows, errors [N] and free columns [N, F]."""
    gram, errors, free = gram.double(), errors.double(), free.double()
    q = _basis(free)
    rest = without(free, without(free, gram).T)
    error = without(free, errors)
    kept = 1 - q.square().sum(1)  # what is left of each unit vector
    usable = kept > 1e-9  # a row that has a free column to itself says nothing
    values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
    values, best = values.clamp(min=0), None
    alone = (error / kept.clamp(min=1e-9))[usable].square()  # of rows left out, with the free columns alone
    along, squares = vectors.T @ error, vectors.square()
    for ridge in (RIDGES * values.mean()).tolist() if usable.any() and values[-1] > 0 else ():
        coefficients = vectors @ (along / (values + ridge))
        # The inverse's diagonal on what is left: the free columns' own directions, with value 0, are no part of it.
        diagonal = squares @ (1 / (values + ridge)) - (1 - kept) / ridge
        gain = alone - (coefficients / diagonal.clamp(min=1e-300))[usable].square()
        explained = (gain.sum() / alone.sum()).item()
        if explained > (best.explained if best else 0.0) and gain.mean() > SURE * gain.std() / len(gain) ** 0.5:
            best = Solution(without(free, coefficients), torch.zeros(0), ridge, explained)
    best = best or Solution(torch.zeros_like(errors), torch.zeros(0), float("inf"), 0.0)
    left = (errors - gram @ best.coefficients)[:, None]
    return replace(best, free=torch.linalg.lstsq(free, left).solution[:, 0] if free.shape[1] else errors[:0])


def _basis(free: Tensor) -> Tensor:
    """Orthonormal columns [N, R] that span the free ones; equal ones count once."""
    if not free.shape[1]:
        return free
    vectors, sizes, _ = torch.linalg.svd(free, full_matrices=False)
    return vectors[:, sizes > 1e-9 * sizes[0].clamp(min=1e-300)]


def scale(information: Tensor, sizes: Sequence[int], floor: float) -> Tensor:
    """S [P], 1 / sqrt(Fisher information), from the mean square of each tensor's rows [L] and its size. Tensors below
    `floor` times the median count as that: where there is little information a step soon leaves what is linear."""
    positive = information[information > 0]
    least = floor * positive.median().item() if len(positive) else 1.0
    each = information.clamp(min=least).rsqrt()
    return torch.cat([value.expand(size) for value, size in zip(each, sizes, strict=True)])
