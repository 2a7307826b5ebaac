"""Intervals for evaluated figures."""

from __future__ import annotations

import numpy as np


def mean_of_good(values: np.ndarray) -> float:
    """Mean of the values [n] that are not NaN; NaN where none is."""
    good = values[~np.isnan(values)]
    return float(good.mean()) if len(good) else float("nan")


def paired_interval(
    before: np.ndarray, after: np.ndarray, level: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """Bootstrap interval of mean(after - before) over the same images: (low, high), percentile method, fixed seed.
    Images of which one is NaN are left out; (NaN, NaN) where none is left.

    Raises:
        ValueError: the two do not pair up.
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) == 0:
        raise ValueError(f"paired samples of one length expected, got {before.shape} and {after.shape}")
    difference = after - before
    difference = difference[~np.isnan(difference)]
    if len(difference) == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(0)
    means = difference[rng.integers(0, len(difference), (draws, len(difference)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
