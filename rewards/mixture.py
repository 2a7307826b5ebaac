"""What each part of a weighted_sum adds to what is trained on: its weight times its score, raw or standardised.

All in float64 and over an epoch's good trajectories, each counted once, in the order of their ids: the same whatever
the ranks and actors."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from rewards.names import Normalise
from rewards.registry import SUM
from rewards.weighted_sum import read_terms

# No spread: a standard deviation of at most this share of the largest score. What float32 models return for one picture
# in batches of other sizes differs by 1e-7 to 1e-6 of it, which must not be blown up to a spread of 1.
FLAT = 1e-5
Parts = Mapping[str, Sequence[float]]  # raw scores [n] by label


@dataclass(frozen=True)
class Mixture:
    weights: Mapping[str, float]  # by label, in the order of the terms
    normalise: Normalise  # among which trajectories parts are standardised

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> Self | None:
        """Of the reward called `name` with these options; None where it is no sum. Raises ValueError as read_terms."""
        if name != SUM:
            return None
        weights = {label: term.weight for label, term in read_terms(options.get("terms")).items()}
        return cls(weights, options.get("normalise", "none"))

    def contributions(self, prompts: Sequence[str], parts: Parts) -> dict[str, np.ndarray]:
        """[n] by label: weight x score, or weight x (score - mean) / std over the n trajectories or those of the same
        prompt; there 0 where these have no spread. Their sum is what is trained on."""
        scores = {label: np.asarray(parts[label], np.float64) for label in self.weights}
        if self.normalise != "none":
            groups = self._groups(prompts)
            scores = {label: standardised(values, groups) for label, values in scores.items()}
        return {label: weight * scores[label] for label, weight in self.weights.items()}

    def trained(self, ids: Sequence[int], prompts: Sequence[str], rows: Sequence[Sequence[float]]) -> list[float]:
        """The sum of the contributions of n trajectories from their raw scores, `rows` [n, K] in the order of the
        weights. An id that is there twice, as in a bad trajectory's place, counts once in means and deviations."""
        places = {number: i for i, number in enumerate(ids)}
        once = list(places.values())
        parts = {label: [rows[i][k] for i in once] for k, label in enumerate(self.weights)}
        total = sum(self.contributions([prompts[i] for i in once], parts).values())
        by_id = dict(zip(places, np.asarray(total).tolist(), strict=True))
        return [by_id[number] for number in ids]

    def without_spread(self, prompts: Sequence[str], parts: Parts) -> list[str]:
        """Labels of the parts that tell no trajectory from another, nor, standardised by prompt, from its prompt's."""
        groups = self._groups(prompts)
        values = {label: np.asarray(parts[label], np.float64) for label in self.weights}
        return [label for label, each in values.items() if all(is_flat(each[rows]) for rows in groups)]

    def _groups(self, prompts: Sequence[str]) -> list[list[int]]:
        if self.normalise != "prompt":
            return [list(range(len(prompts)))]
        rows: dict[str, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            rows[prompt].append(row)
        return list(rows.values())


def standardised(values: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """[n]: within each group of rows mean 0 and standard deviation (of the population) 1, or all 0 without spread."""
    result = np.zeros(len(values))
    for rows in groups:
        own = values[rows]
        if not is_flat(own):
            result[rows] = (own - own.mean()) / own.std()
    return result


def is_flat(values: np.ndarray) -> bool:
    return bool(values.std() <= FLAT * np.abs(values).max())


def shares(contributions: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """cov(c_k, c) / var(c) of each contribution c_k to the sum c: they sum to 1, and one that works against the others
    may be below 0. None where the sum has no spread."""
    each = np.stack(list(contributions.values()))
    total = each.sum(0)
    if total.std() <= FLAT * np.abs(each).max():
        return dict.fromkeys(contributions)
    apart = total - total.mean()
    covariances = (each - each.mean(1, keepdims=True)) @ apart / (apart @ apart)
    return dict(zip(contributions, covariances.tolist(), strict=True))
