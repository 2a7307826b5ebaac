"""Statistics of evaluated pictures, from their features and rewards alone: diversity, drift, and 95 % intervals.

Features are [n, F], a row a picture (rewards/judges.py). Rows with a NaN, of bad pictures, are left out. Every draw
has a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 10_000  # of a bootstrap
HALVES = 100  # random halves of the pictures
LEVEL = 0.95  # of every interval
Interval = tuple[float, float]


def vendi(features: np.ndarray) -> float:
    """Vendi score (arXiv 2210.02410) with the cosine kernel, the effective number of different pictures, 1 to n: exp of
    the entropy of the eigenvalues of K / n, K [n, n] the cosines. NaN without pictures."""
    unit = _unit(_good(features))
    if len(unit) == 0:
        return float("nan")
    values = np.linalg.svd(unit / np.sqrt(len(unit)), compute_uv=False) ** 2  # K's, and as many as F or n
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def prompt_distances(features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Mean cosine distance [n], 0 to 2, of each picture to the others of its prompt, or, where no prompt has two, to
    all others; NaN where there is none."""
    names, groups = np.unique(prompts, return_inverse=True)
    if len(names) == len(prompts):
        groups = np.zeros(len(prompts), int)
    distances = np.full(len(features), np.nan)
    for group in range(groups.max() + 1):
        rows = np.flatnonzero((groups == group) & ~np.isnan(features).any(1))
        if len(rows) > 1:
            unit = _unit(features[rows])
            cosines = unit @ unit.T
            distances[rows] = 1 - (cosines.sum(1) - cosines.diagonal()) / (len(rows) - 1)
    return distances


def fid(features: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance (arXiv 1706.08500) of two sets of pictures: 0 for equal means and covariances; its bias grows as
    n shrinks, so it is compared only between sets of one size. NaN of fewer than two pictures on a side."""
    sets = [_good(rows).astype(np.float64) for rows in (features, reference)]
    if min(map(len, sets)) < 2:
        return float("nan")
    (mean, a), (mean_of_reference, b) = ((rows.mean(0), rows - rows.mean(0)) for rows in sets)
    a, b = a / np.sqrt(len(a) - 1), b / np.sqrt(len(b) - 1)  # covariances are a'a and b'b:
    root = np.linalg.norm(a @ b.T, "nuc")  # the trace of (a'a b'b)^1/2 is the sum of the singular values of ab'
    return float(((mean - mean_of_reference) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * root)


def kid(features: np.ndarray, reference: np.ndarray) -> float:
    """Kernel distance (squared MMD, cubic kernel, arXiv 1801.01401) of two sets: unbiased, so it may be below 0. NaN of
    fewer than two pictures on a side."""
    sets = [_good(rows).astype(np.float64) for rows in (features, reference)]
    if min(map(len, sets)) < 2:
        return float("nan")
    (own, across), (_, other) = [[(x @ y.T / x.shape[1] + 1) ** 3 for y in sets] for x in sets]
    within = sum((kernel.sum() - kernel.trace()) / (len(kernel) * (len(kernel) - 1)) for kernel in (own, other))
    return float(within - 2 * across.mean())


def mean_of_good(values: np.ndarray) -> float:
    """Mean of the values [n] that are not NaN; NaN where none is."""
    good = values[~np.isnan(values)]
    return float(good.mean()) if len(good) else float("nan")


def mean_interval(values: np.ndarray) -> Interval:
    """Bootstrap interval (low, high) of the mean of `values` [n], NaN left out: percentile method. A single value is
    its own interval, and of none it is (NaN, NaN)."""
    good = values[~np.isnan(values)]
    if len(good) < 2:
        return mean_of_good(values), mean_of_good(values)
    from scipy.stats import bootstrap  # it takes a second

    rng = np.random.default_rng(0)
    result = bootstrap((good,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=rng)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_interval(before: np.ndarray, after: np.ndarray) -> Interval:
    """As `mean_interval`, of after - before over the same pictures."""
    return mean_interval(after - before)


def half_interval(statistic: Callable[..., float], *features: np.ndarray) -> Interval:
    """Interval (low, high) of a statistic of whole sets, such as `vendi` and `fid`, around its value.

    By half-sampling, since pictures drawn twice would look like a lack of diversity: the statistic of half of them,
    drawn without replacement, spreads about as much as that of all. What halves shift it by is taken out.
    """
    value, sets = statistic(*features), [_good(rows) for rows in features]
    if min(map(len, sets)) < 4:
        return float("nan"), float("nan")
    rng = np.random.default_rng(0)
    halves = np.array(
        [statistic(*(rows[rng.permutation(len(rows))[: len(rows) // 2]] for rows in sets)) for _ in range(HALVES)]
    )
    low, high = np.quantile(halves - halves.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value + float(low), value + float(high)


def _good(features: np.ndarray) -> np.ndarray:
    return features[~np.isnan(features).any(1)]


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, in float64."""
    rows = features.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
