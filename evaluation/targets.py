"""The exact target of a residual objective, estimated from base pictures alone, and how near a tuned set is to it.

The target p_ref exp(beta r) / Z_c of a prompt c is the law of the base model's pictures, each weighted by exp(beta r)
within its prompt (tilts.py). So every law of an attribute, mean reward and distance under it is known with its error,
without any training. Laws are compared within prompts: total variations are means over prompts, by pictures.

Two sets of finite size differ even if their laws do not: `floor` and `floor_high` are the median and the upper end
(LEVEL) of the total variation of as many pictures drawn from the estimated target and a target estimated anew from
as many base pictures, over DRAWS draws. Intervals are of the figure of sets of this size, at other noise (metrics.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation import metrics, tilts
from evaluation.metrics import LEVEL, student_interval

DRAWS = 200
FEW = 50  # effective base pictures, fewer of which tell no law
Figure = dict[str, float | None]


@dataclass(frozen=True)
class Sample:
    """Pictures of a set: n of them, in the order of the noise; NaN where one is bad."""

    rewards: np.ndarray  # [n]
    features: np.ndarray | None  # [n, F]
    codes: Mapping[str, np.ndarray]  # by attribute, [n] int64: which of its values


class Target:
    """n places of the same prompts, the tuned set's pictures there, and K base pictures for each."""

    def __init__(self, exponent: float, prompts: Sequence[str], tuned: Sample, base: Sequence[Sample]) -> None:
        """The first of `base` has the tuned set's noise. Raises ValueError where no prompt has two good pictures."""
        good = np.isfinite([part.rewards for part in (tuned, *base)]).all(0)
        groups = np.unique(np.asarray(prompts, object), return_inverse=True)[1]
        self.kept = np.flatnonzero(good & (np.bincount(groups[good], minlength=len(groups))[groups] > 1))
        if not len(self.kept):
            raise ValueError("no prompt has two good pictures")
        self.prompts = [prompts[i] for i in self.kept.tolist()]
        self.groups = np.unique(groups[self.kept], return_inverse=True)[1]  # [n]
        self.tuned, self.base, self.exponent = tuned, base, exponent
        self.places = np.tile(self.groups, len(base))  # [K n], prompts of the base pictures
        self.rewards = np.concatenate([part.rewards[self.kept] for part in base])
        self.weights = tilts.weights(self.rewards, self.places, exponent)
        self.counts = np.bincount(self.groups)
        self.share = self.counts / self.counts.sum()
        self.sizes = tilts.sample_sizes(self.weights, self.places)  # of each prompt

    @property
    def size(self) -> float:
        """Effective number of base pictures, of all prompts together."""
        return float(1 / (self.share**2 / self.sizes).sum())

    def drawn(self, count: int) -> list[tuple[int, int]]:
        """Base pictures as the target has them: (set, place) of at most `count` different ones, drawn by weight, by
        prompt."""
        chances = self.weights * self.share[self.places]
        count = min(count, int(np.count_nonzero(chances)))
        chosen = np.random.default_rng(0).choice(len(chances), count, replace=False, p=chances / chances.sum())
        chosen = chosen[np.argsort(self.places[chosen], kind="stable")]
        return [(int(i // len(self.kept)), int(self.kept[i % len(self.kept)])) for i in chosen]

    def parts(self, values: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """[n]: what each place's base pictures move a weighted mean by, times n; of their `values` [K n], whose mean
        in each prompt under the target is `mean` [C]."""
        weighted = self.weights * len(self.base) * self.counts[self.places]
        return (weighted * (values - mean[self.places])).reshape(len(self.base), -1).mean(0)

    def mean(self, values: np.ndarray) -> np.ndarray:
        """[C] under the target, of base pictures' values [K n]."""
        return np.bincount(self.places, self.weights * values)

    def reward(self) -> Figure:
        """Mean rewards: of the tuned set (value, low, high), `base`, `target` with its interval, and `over`: how far
        the tuned set is above the target, with its interval."""
        tuned, aim = self.tuned.rewards[self.kept], self.mean(self.rewards)
        target = aim[self.groups] + self.parts(self.rewards, aim)
        over = tuned - target
        return _figure(
            value=tuned.mean(), interval=metrics.mean_interval(tuned, self.prompts),
            base=self.base[0].rewards[self.kept].mean(), target=target.mean(), over=over.mean(),
            target_interval=student_interval(target, self.groups), over_interval=student_interval(over, self.groups),
        )  # fmt: skip

    def distance(self) -> Figure | None:
        """Mean cosine distance of two pictures of a prompt: of the tuned set (value, low, high), `base`, and `target`
        with its interval: of pairs by their weights. None without features."""
        sets = [part.features for part in (self.tuned, *self.base)]
        if any(features is None for features in sets):
            return None
        tuned, *base = (features[self.kept] for features in sets if features is not None)
        unit = np.concatenate(base).astype(np.float64)
        unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        centre = np.zeros((len(self.counts), unit.shape[1]))
        np.add.at(centre, self.places, self.weights[:, None] * unit)
        square = (centre**2).sum(1)
        apart = (1 - square) / np.maximum(1 - 1 / self.sizes, 1e-12)
        along = (unit * centre[self.places]).sum(1)
        target = apart[self.groups] - 2 * self.parts(along, square)
        value, *interval = metrics.distance(tuned, self.prompts)
        return _figure(
            value=value, interval=interval, base=metrics.distance(base[0], self.prompts)[0],
            target=float(self.share @ apart), target_interval=student_interval(target, self.groups),
        )  # fmt: skip

    def law(self, name: str, count: int) -> dict[str, Any]:
        """Laws of an attribute of `count` values, over all prompts (base, target, tuned), and `tv`: the tuned set's
        total variation to the target (value, low, high), the base set's, and what sets of this size make of it."""
        tuned, base, pool = self._codes(name)
        aim = laws(pool, self.places, self.weights, count)
        own, first = (laws(codes, self.groups, np.ones(len(codes)), count) for codes in (tuned, base))
        whole = laws(pool, self.places, np.ones(len(pool)), count)
        sign = np.sign(own - aim)
        up = (sign * own).sum(1)[self.groups]
        moved = sign[self.groups, tuned] - up - self.parts(sign[self.places, pool], (sign * aim).sum(1))
        each = variations(own, aim)[self.groups] + moved / 2
        low, high = student_interval(each, self.groups)
        tv = _figure(
            value=self.share @ variations(own, aim), interval=(max(0.0, low), min(1.0, high)),
            base=self.share @ variations(first, aim),
        )  # fmt: skip
        tv["floor"], tv["floor_high"] = floor(self.counts, aim, self.places, pool, self.weights)
        return {"base": [*self.share @ whole], "target": [*self.share @ aim], "tuned": [*self.share @ own], "tv": tv}

    def drift(self, name: str, count: int, given: str, others: int) -> Figure:
        """Total variation between the tuned set's law of an attribute and the base model's, both among pictures of the
        same prompt and the same value of the attribute `given` (of `others` values): what a reward that sees that one
        alone leaves as it is. With its floor; `judged` is the share of the tuned pictures that have base pictures
        beside them."""
        tuned, _, pool = self._codes(name)
        of_tuned, _, of_pool = self._codes(given)
        cells, among = self.groups * others + of_tuned, self.places * others + of_pool
        both = np.intersect1d(cells, among)
        mine, theirs = np.isin(cells, both), np.isin(among, both)
        if not len(both):
            return {"value": None, "floor": None, "floor_high": None, "judged": 0.0}
        cells, among = np.searchsorted(both, cells[mine]), np.searchsorted(both, among[theirs])
        counts = np.bincount(cells)
        own = laws(tuned[mine], cells, np.ones(len(cells)), count)
        base = laws(pool[theirs], among, ones := np.ones(len(among)), count)
        value = float(counts / counts.sum() @ variations(own, base))
        least, most = floor(counts, base, among, pool[theirs], ones)
        return {"value": value, "floor": least, "floor_high": most, "judged": float(mine.mean())}

    def _codes(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[n] of the tuned set and of the base set at the same noise, [K n] of all base sets."""
        base = [part.codes[name][self.kept] for part in self.base]
        return self.tuned.codes[name][self.kept], base[0], np.concatenate(base)


def judge(target: Target, values: Mapping[str, Sequence[str]], given: str | None = None) -> dict[str, Any]:
    """All figures; docs/evaluation.md has the keys. `given` is the attribute that drifts are given: by default the one
    whose law the target moves most."""
    found = {name: target.law(name, len(known)) for name, known in values.items()}
    given = given or max(found, key=lambda name: found[name]["tv"]["base"] or 0.0)
    for name, known in values.items():
        other = name != given
        drift = target.drift(name, len(known), given, len(values[given])) if other else None
        found[name] |= {"drift": drift}
    size, least = target.size, float(target.sizes.min())
    pictures = len(target.places)
    few = (
        f"beta {target.exponent:g} is too large for {pictures} base pictures, which count as {size:.3g}: no figure of "
    )
    return {
        "beta": target.exponent, "base_pictures": pictures, "ess": size, "ess_least": least, "given": given,
        "warning": f"{few}the target is to be believed; draw more with --images" if size < FEW else None,
        "reward": target.reward(), "distance": target.distance(),
        "attributes": [{"name": name, "values": [*values[name]], **law} for name, law in found.items()],
    }  # fmt: skip


def laws(codes: np.ndarray, groups: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """[G, count] of `codes` [m] in groups 0 to G - 1, by weights."""
    sums = np.bincount(groups * count + codes, weights, (int(groups.max()) + 1) * count).reshape(-1, count)
    return sums / sums.sum(1, keepdims=True)


def variations(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Total variation [G] of laws [G, V]."""
    return np.abs(one - other).sum(1) / 2


def floor(
    counts: np.ndarray, law: np.ndarray, groups: np.ndarray, codes: np.ndarray, weights: np.ndarray
) -> tuple[float, float]:
    """Median and upper end of the total variation between `counts` [G] pictures drawn from `law` [G, V], and the law of
    pictures with `codes` [m] and `weights`, drawn anew with replacement within their groups [m]."""
    rng, share = np.random.default_rng(0), counts / counts.sum()
    order, sizes = np.argsort(groups, kind="stable"), np.bincount(groups)
    start, many, sorted_groups = (np.cumsum(sizes) - sizes)[groups[order]], sizes[groups[order]], groups[order]
    drawn = []
    for _ in range(DRAWS):
        again = order[start + (rng.random(len(order)) * many).astype(np.int64)]
        estimated = laws(codes[again], sorted_groups, weights[again], law.shape[1])
        sampled = rng.multinomial(counts, law / law.sum(1, keepdims=True)) / counts[:, None]
        drawn.append(float(share @ variations(sampled, estimated)))
    return float(np.median(drawn)), float(np.quantile(drawn, LEVEL, method="higher"))


def _figure(
    interval: Sequence[float],
    target_interval: Sequence[float] = (),
    over_interval: Sequence[float] = (),
    **numbers: Any,
) -> Figure:
    ends = {"": interval, "target_": target_interval, "over_": over_interval}
    for name, pair in ends.items():
        numbers |= {f"{name}{end}": value for end, value in zip(("low", "high"), pair, strict=False)}
    return {name: float(value) if math.isfinite(value) else None for name, value in numbers.items()}
