"""Ideal tilts: the law of the base model's pictures, each weighted by exp(exponent x reward) within its prompt.

What a residual objective aims at is such a law, and no law that is as many nats away from the base model has a higher
mean reward. Both are known from base pictures alone, as well as they represent what the weights make likely: the
effective sample size says how well.
"""

from __future__ import annotations

import numpy as np

# Nats: the correction of log Z's bias, half of the mean of 1 / ESS - 1 / n over prompts, from which on it is no longer
# known: intervals of Gaussian rewards then hold the truth less than nine times in ten (docs/evaluation.md).
MOST_BIAS = 0.075
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


def bias(sizes: np.ndarray, counts: np.ndarray) -> float:
    """Nats by which log Z is too low on average, from effective and true sample sizes [G]."""
    return float((1 / sizes - 1 / counts).mean() / 2)


def tilted(rewards: np.ndarray, groups: np.ndarray, exponent: float) -> tuple[np.ndarray, float, float]:
    """Weights [M] of a tilt, its nats from the base model, and what it adds to the mean reward; prompts count alike."""
    counts = np.bincount(groups)
    weighted = weights(rewards, groups, exponent)
    known = np.where(weighted > 0, weighted * np.log(np.maximum(weighted * counts[groups], 1e-300)), 0)
    share = 1 / counts[groups] / len(counts)
    return weighted, float(known.sum() / len(counts)), float((weighted / len(counts) - share) @ rewards)


def ideal_gain(rewards: np.ndarray, groups: np.ndarray, nats: float) -> float | None:
    """How far above the base model's mean reward its best law at `nats` from it is, with one exponent for all prompts:
    of base pictures' rewards [M]. None where these are too few to tell, or nothing differs."""
    counts = np.bincount(groups)
    if not len(counts) or counts.min() < 2 or np.ptp(rewards) == 0 or not np.isfinite(nats):
        return None
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
    weighted, _, gain = tilted(rewards, groups, high)
    return gain if bias(sample_sizes(weighted, groups), counts) <= MOST_BIAS else None
