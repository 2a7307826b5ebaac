"""Which transitions of a trajectory are trained on. Drawn before scoring, so only needed states are scored."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from diffusion import noise
from diffusion.settings import Selection


def select(
    kind: Selection, fraction: float, num_steps: int, seed: int, epoch: int, trajectory_ids: Sequence[int]
) -> np.ndarray:
    """Selected steps [B, K] int64, ascending in each row. random: round(fraction * num_steps) distinct ones, uniformly.
    low_variance: the last, and one of each of round(fraction * num_steps) equal stretches of the others (arXiv
    2412.07775, section "low-variance subsampling")."""
    if kind == "all":
        return np.tile(np.arange(num_steps), (len(trajectory_ids), 1))
    count = max(1, round(fraction * num_steps))
    rows = []
    for item in trajectory_ids:
        rng = noise.generator(seed, noise.SELECTION, epoch, int(item))
        if kind == "random":
            rows.append(np.sort(rng.choice(num_steps, count, replace=False)))
        else:
            count = min(count, num_steps - 1)
            edges = np.linspace(0, num_steps - 1, count + 1).round().astype(int)
            inner = [int(rng.integers(low, high)) for low, high in itertools.pairwise(edges)]
            rows.append(np.array([*inner, num_steps - 1]))
    return np.stack(rows).astype(np.int64)
