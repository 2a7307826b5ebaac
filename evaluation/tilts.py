"""Ideal tilts: the law of the base model's pictures, each weighted by exp(exponent x reward) within its prompt.

What a residual objective aims at is such a law, and no law that is as many nats away from the base model has a higher
mean reward. Both are known from base pictures alone, as well as they represent what the weights make likely: the
effective sample size says how well.
"""

from __future__ import annotations

import numpy as np

# Nats, about, by which log Z from as many pictures would be too low, were exponent x reward normal: above that it is
# taken for unknown (docs/evaluation.md has how often intervals hold the truth below).
MOST_BIAS = 0.5
DOUBLINGS = 60  # in the search for an exponent


def weights(rewards: np.ndarray, groups: np.ndarray, exponent: float) -> np.ndarray:
    """[M] of M pictures with finite rewards in `groups` (0 to G - 1, none empty): each group's add up to 1."""
    values = exponent * rewards.astype(np.float64)
    most = np.full(groups.max(initial=-1) + 1, -np.inf)
    np.maximum.at(most, groups, values)
    raised = np.exp(values - most[groups])
    return raised / np.bincount(groups, raised)[groups]


def sample_sizes(weighted: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Effective sample size [G] of each group: 1 / sum of its squared weights."""
    return 1 / np.bincount(groups, weighted**2)


def known(rewards: np.ndarray, groups: np.ndarray, exponent: float) -> bool:
    """Whether as many pictures [M] tell the mean of exp(exponent x reward) of each group. By the rewards' variance
    within groups, not by the effective sample size: that is largest where by chance no picture has a large weight."""
    counts = np.bincount(groups)
    if len(groups) <= len(counts):
        return False
    values = exponent * rewards.astype(np.float64)
    variance = ((values - (np.bincount(groups, values) / counts)[groups]) ** 2).sum() / (len(groups) - len(counts))
    return float(np.expm1(min(variance, 100.0)) / 2 * (1 / counts).mean()) <= MOST_BIAS


def tilted(rewards: np.ndarray, groups: np.ndarray, exponent: float) -> tuple[np.ndarray, float, float]:
    """Weights [M] of a tilt, its nats from the base model, and what it adds to the mean reward; prompts count alike."""
    counts = np.bincount(groups)
    weighted = weights(rewards, groups, exponent)
    each = np.where(weighted > 0, weighted * np.log(np.maximum(weighted * counts[groups], 1e-300)), 0)
    share = 1 / counts[groups] / len(counts)
    return weighted, float(each.sum() / len(counts)), float((weighted / len(counts) - share) @ rewards)


def ideal_gain(rewards: np.ndarray, groups: np.ndarray, nats: float) -> float | None:
    """How far above the base model's mean reward its best law at `nats` from it is, with one exponent for all prompts:
    of base pictures' rewards [M]. None where these are too few to tell, or nothing differs."""
    counts = np.bincount(groups)
    if not len(counts) or counts.min() < 2 or np.ptp(rewards) == 0 or not np.isfinite(nats):
        return None
    if nats <= 0:
        return 0.0
    low, high = 0.0, 1 / float(np.std(rewards))
    for _ in range(DOUBLINGS):
        if tilted(rewards, groups, high)[1] >= nats:
            break
        low, high = high, 2 * high
    else:
        return None
    for _ in range(DOUBLINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if tilted(rewards, groups, middle)[1] < nats else (low, middle)
    return tilted(rewards, groups, high)[2] if known(rewards, groups, high) else None
