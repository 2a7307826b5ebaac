"""The step of `learner.optimizer=natural`: least squares of the objective's residuals in the adapter's parameters.

A squared-residual objective is, near the present weights, a regression: residual i is e_i, and moving the parameters by
d moves it by g_i . d, g_i being the gradient of what the objective makes of log p_F. With N trajectories an epoch and
more parameters than that the minimum-norm solution needs the N x N Gram matrix of the rows alone, as MinSR (arXiv
2302.01941) and SPRING (arXiv 2401.10190) do for quantum states:

    d = S^2 G^T a,   (G S^2 G^T + ridge) a = e     with a free intercept a group of rows

S scales parameters to equal Fisher information; the ridge is the one whose leave-one-out error is least, which is exact
and free once the Gram matrix is factorised. There is no learning rate, and where leaving one out shows that nothing can
be told from noise, no step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SURE = 2.0  # standard errors by which rows left out must gain: less is what the choice among ridges finds in noise
RIDGES = torch.logspace(-5, 5, 41, dtype=torch.float64)  # times the mean eigenvalue


@dataclass(frozen=True)
class Solution:
    """`coefficients` [N] float64 of the rows (0: no step); `explained` is the share of the errors' variance that rows
    left out of the fit explain, at most 1; 0 where no step is taken."""

    coefficients: Tensor
    ridge: float
    explained: float


def centre(values: Tensor, groups: Tensor) -> Tensor:
    """Values [N, ...] less the mean of each's group [N] int64; a group below 0 is not centred."""
    mask = groups >= 0
    index, count = groups.clamp(min=0), int(groups.max().item()) + 1 if mask.any() else 1
    flat = values.reshape(len(values), -1)
    sums = flat.new_zeros(count, flat.shape[1]).index_add_(0, index[mask], flat[mask])
    sizes = torch.bincount(index[mask], minlength=count).clamp(min=1).to(flat.dtype)
    means = (sums / sizes[:, None])[index] * mask[:, None]
    return (flat - means).reshape(values.shape)


def solve(gram: Tensor, errors: Tensor, groups: Tensor) -> Solution:
    """From the Gram matrix [N, N] of the (scaled, uncentred) rows, errors [N] and groups [N] (an intercept each, -1:
    none). The errors' fit by rows moved `d` is what makes errors + rows . d small: coefficients carry the minus."""
    gram, errors = gram.double(), errors.double()
    centred = centre(centre(gram, groups).T, groups)
    error = centre(errors, groups)
    values, vectors = torch.linalg.eigh((centred + centred.T) / 2)
    values = values.clamp(min=0)
    # What the projection on centred vectors leaves of each unit vector: 1 - 1/n in a group of n.
    sizes = torch.bincount(groups[groups >= 0], minlength=1).clamp(min=1)
    kept = torch.where(groups >= 0, 1 - 1 / sizes[groups.clamp(min=0)].double(), torch.ones_like(errors))
    usable = kept > 0  # alone in its group a row says nothing
    if not usable.any() or not values[-1] > 0:
        return Solution(torch.zeros_like(errors), float("inf"), 0.0)
    alone = (error / kept.clamp(min=1e-12))[usable].square()  # of rows left out, with the intercepts alone
    along, squares = vectors.T @ error, vectors.square()
    best = Solution(torch.zeros_like(errors), float("inf"), 0.0)
    for ridge in (RIDGES * values.mean()).tolist():
        coefficients = vectors @ (along / (values + ridge))
        # The diagonal of the inverse on centred vectors: those of the intercepts, with value 0, are no part of it.
        diagonal = squares @ (1 / (values + ridge)) - (1 - kept) / ridge
        gain = alone - (coefficients / diagonal.clamp(min=1e-300))[usable].square()
        explained = (gain.sum() / alone.sum()).item()
        if explained > best.explained and gain.mean() > SURE * gain.std() / len(gain) ** 0.5:
            best = Solution(-coefficients, ridge, explained)
    return best


def scale(information: Tensor, sizes: Sequence[int], floor: float) -> Tensor:
    """S [P], 1 / sqrt(Fisher information), from the mean square of each tensor's rows [L] and its size. Tensors below
    `floor` times the median count as that: where there is little information a step soon leaves what is linear."""
    positive = information[information > 0]
    least = floor * positive.median().item() if len(positive) else 1.0
    each = information.clamp(min=least).rsqrt()
    return torch.cat([value.expand(size) for value, size in zip(each, sizes, strict=True)])
