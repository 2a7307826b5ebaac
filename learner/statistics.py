"""Intervals for evaluated figures."""

from __future__ import annotations

import numpy as np


def paired_interval(
    before: np.ndarray, after: np.ndarray, level: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """Bootstrap interval of mean(after - before) over the same images: (low, high), percentile method, fixed seed.

    Raises:
        ValueError: the two do not pair up.
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) == 0:
        raise ValueError(f"paired samples of one length expected, got {before.shape} and {after.shape}")
    difference = after - before
    rng = np.random.default_rng(0)
    means = difference[rng.integers(0, len(difference), (draws, len(difference)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
