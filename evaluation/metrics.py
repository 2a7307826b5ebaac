"""Statistics of evaluated pictures, from their features and rewards alone: diversity, drift, and 95 % intervals.

Features are [n, F], a row a picture (rewards/features.py). Rows with a NaN, of bad pictures, are left out. Every draw
has a fixed seed. torch, torchmetrics and scipy are imported where they are used: they take seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 10_000  # of a bootstrap
HALVES = 100  # random halves of the pictures
PER_PROMPT = 8  # pictures that a prompt must have for a Frechet distance of its own
LEVEL = 0.95  # of every interval
Statistic = Callable[..., float]
Interval = tuple[float, float]


def vendi(features: np.ndarray) -> float:
    """Vendi score (arXiv 2210.02410) with the cosine kernel: the effective number of different pictures, 1 to n.

    exp of the entropy of the eigenvalues of K / n, K [n, n] the cosines. NaN without pictures.
    """
    unit = _unit(_good(features))
    if len(unit) == 0:
        return float("nan")
    values = np.linalg.svd(unit / np.sqrt(len(unit)), compute_uv=False) ** 2  # K's, and as many as F or n
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def prompt_distances(features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Mean cosine distance [n], 0 to 2, of each picture to the others of its prompt, or, where no prompt has two, to
    all others; NaN where there is none."""
    groups = list(rows_of(prompts).values())
    if len(groups) == len(prompts):
        groups = [np.arange(len(prompts))]
    distances = np.full(len(features), np.nan)
    for group in groups:
        rows = group[~np.isnan(features[group]).any(1)]
        if len(rows) > 1:
            unit = _unit(features[rows])
            cosines = unit @ unit.T
            distances[rows] = 1 - (cosines.sum(1) - cosines.diagonal()) / (len(rows) - 1)
    return distances


def fid(features: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance of two sets of pictures: 0 for equal means and covariances; its bias grows as n shrinks, so it
    is compared only between sets of one size. The conventional figure is that of Inception features. NaN of fewer
    than two pictures on a side."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    return _drift(FrechetInceptionDistance, features, reference)


def kid(features: np.ndarray, reference: np.ndarray) -> float:
    """Kernel distance (squared MMD, cubic kernel, arXiv 1801.01401) of two sets: unbiased, so it may be below 0. NaN of
    fewer than two pictures on a side."""
    from torchmetrics.image.kid import KernelInceptionDistance

    least = min(len(_good(features)), len(_good(reference)))
    return _drift(KernelInceptionDistance, features, reference, subsets=1, subset_size=least)


def mean_per_prompt(statistic: Statistic, prompts: Sequence[str], *features: np.ndarray) -> np.ndarray:
    """The statistic of each prompt's own pictures [prompts], in the order of their first pictures. All `features` have
    a row for each of `prompts`."""
    return np.array([statistic(*(one[rows] for one in features)) for rows in rows_of(prompts).values()])


def rows_of(prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """The rows of each prompt's pictures."""
    rows: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return {prompt: np.array(numbers) for prompt, numbers in rows.items()}


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
    from scipy.stats import bootstrap

    ends = bootstrap(
        (good,), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(ends.low), float(ends.high)


def paired_interval(before: np.ndarray, after: np.ndarray) -> Interval:
    """As `mean_interval`, of after - before over the same pictures.

    Raises:
        ValueError: the two do not pair up.
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) == 0:
        raise ValueError(f"paired samples of one length expected, got {before.shape} and {after.shape}")
    return mean_interval(after - before)


def half_interval(statistic: Statistic, *features: np.ndarray) -> Interval:
    """Interval (low, high) of a statistic of whole sets, such as `vendi` and `fid`, around its value.

    Pictures drawn twice would look like a lack of diversity, so it is not the bootstrap but half-sampling: the
    statistic of half the pictures, drawn without replacement, spreads about as much as that of all does. What half the
    pictures shift it by is taken out.
    """
    value, good = statistic(*features), [_good(one) for one in features]
    if min(map(len, good)) < 4:
        return float("nan"), float("nan")
    rng = np.random.default_rng(0)
    halves = np.array(
        [statistic(*(one[rng.permutation(len(one))[: len(one) // 2]] for one in good)) for _ in range(HALVES)]
    )
    low, high = np.quantile(halves - halves.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value + float(low), value + float(high)


def _drift(metric_type: Any, features: np.ndarray, reference: np.ndarray, **settings: int) -> float:
    """One of torchmetrics' distances, whose network is to hand the features through as they are."""
    import torch

    features, reference = _good(features), _good(reference)
    if min(len(features), len(reference)) < 2:
        return float("nan")
    network: Any = torch.nn.Identity()
    network.num_features = features.shape[1]
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # it shuffles
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features: they are few
        torch.manual_seed(0)
        metric = metric_type(feature=network, **settings)
        for real, rows in ((True, reference), (False, features)):
            metric.update(torch.from_numpy(np.ascontiguousarray(rows, np.float32)), real=real)
        result = metric.compute()
    return float(result[0] if isinstance(result, tuple) else result)


def _good(features: np.ndarray) -> np.ndarray:
    return features[~np.isnan(features).any(1)]


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, in float64."""
    rows = features.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
