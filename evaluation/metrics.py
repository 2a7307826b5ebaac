"""What evaluated pictures are judged by, from their features and rewards alone: diversity, drift, intervals.

Features are [n, F], a row a picture (rewards/features.py). Rows with a NaN, of bad pictures, are left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

DRAWS = 100  # of half the pictures
PER_PROMPT = 8  # pictures that a prompt must have for a Frechet distance of its own
Statistic = Callable[..., float]


def vendi(features: np.ndarray) -> float:
    """Vendi score (arXiv 2210.02410) with the cosine kernel: the effective number of different pictures, 1 to n.

    exp of the entropy of the eigenvalues of K / n, K [n, n] the cosines. NaN without pictures.
    """
    unit = _unit(features)
    if len(unit) == 0:
        return float("nan")
    values = np.linalg.svd(unit / np.sqrt(len(unit)), compute_uv=False) ** 2  # K's, and as many as F or n
    values = values[values > 1e-12]
    return float(np.exp(-(values * np.log(values)).sum()))


def distance(features: np.ndarray) -> float:
    """Mean cosine distance, 0 to 2, of two different pictures. NaN of fewer than two."""
    unit = _unit(features)
    n = len(unit)
    if n < 2:
        return float("nan")
    total = unit.sum(0)
    return float(1 - (total @ total - n) / (n * (n - 1)))


def fid(features: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance of two sets of pictures: 0 for equal means and covariances; its bias grows as n shrinks, so it
    is compared only between sets of one size. The conventional figure is that of Inception features. NaN of fewer
    than two pictures on a side."""
    from torchmetrics.image.fid import FrechetInceptionDistance  # here: it takes seconds to import

    return _metric(FrechetInceptionDistance(feature=_Given(features.shape[1])), features, reference)


def kid(features: np.ndarray, reference: np.ndarray) -> float:
    """Kernel distance (squared MMD, cubic kernel, arXiv 1801.01401) of two sets: unbiased, so it may be below 0."""
    from torchmetrics.image.kid import KernelInceptionDistance

    least = min(len(_good(features)), len(_good(reference)))
    if least < 2:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features: they are few
        metric = KernelInceptionDistance(feature=_Given(features.shape[1]), subsets=1, subset_size=least)
    return _metric(metric, features, reference)


def mean_per_prompt(statistic: Statistic, prompts: Sequence[str], *features: np.ndarray) -> np.ndarray:
    """The statistic of each prompt's own pictures [prompts], in the order of their first pictures. All `features` have
    a row for each of `prompts`."""
    rows = rows_of(prompts)
    return np.array([statistic(*(one[where] for one in features)) for where in rows.values()])


def rows_of(prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Which pictures each prompt has."""
    found: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(row)
    return {prompt: np.array(rows) for prompt, rows in found.items()}


def mean_interval(values: np.ndarray, level: float = 0.95, draws: int = 10_000) -> tuple[float, float]:
    """Bootstrap interval of the mean of `values` [n], NaN left out: percentile method, fixed seed."""
    good = values[~np.isnan(values)]
    if len(good) == 0:
        return float("nan"), float("nan")
    means = good[np.random.default_rng(0).integers(0, len(good), (draws, len(good)))].mean(1)
    return _ends(means, level)


def half_interval(
    statistic: Statistic, *features: np.ndarray, level: float = 0.95, draws: int = DRAWS
) -> tuple[float, float]:
    """Interval of a statistic of whole sets, such as `vendi` and `fid`, around its value.

    Pictures drawn twice would look like a lack of diversity, so it is not the bootstrap but half-sampling: the
    statistic of half the pictures, drawn without replacement, spreads about as much as that of all does. What half the
    pictures shift it by is taken out. Fixed seed.
    """
    value = statistic(*features)
    good = [_good(one) for one in features]
    if min(map(len, good)) < 4:
        return float("nan"), float("nan")
    rng = np.random.default_rng(0)
    found = np.array(
        [statistic(*(one[rng.permutation(len(one))[: len(one) // 2]] for one in good)) for _ in range(draws)]
    )
    low, high = _ends(found - found.mean(), level)
    return value + low, value + high


class _Given(torch.nn.Module):
    """Hands features through where torchmetrics expects a network that makes them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def _metric(metric: Any, features: np.ndarray, reference: np.ndarray) -> float:
    if min(len(_good(features)), len(_good(reference))) < 2:
        return float("nan")
    with torch.random.fork_rng(devices=[]):  # it shuffles
        torch.manual_seed(0)
        for real, one in ((True, reference), (False, features)):
            metric.update(torch.from_numpy(np.ascontiguousarray(_good(one), np.float32)), real=real)
        found = metric.compute()
    return float(found[0] if isinstance(found, tuple) else found)


def _good(features: np.ndarray) -> np.ndarray:
    return features[~np.isnan(features).any(1)]


def _unit(features: np.ndarray) -> np.ndarray:
    good = _good(features).astype(np.float64)
    return good / np.maximum(np.linalg.norm(good, axis=1, keepdims=True), 1e-12)


def _ends(values: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
