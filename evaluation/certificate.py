"""How far a policy is from its objective's target, in nats, without ever having seen the target.

The target is p_ref exp(beta r) / Z_c, p_ref the base model with the run's sampler, c the prompt. On whole paths

    gap = KL(policy || target) = log Z_c - E_policy[beta r - Delta],    log Z_c = log E_ref[exp(beta r)]

Delta being log p_F - log p_ref of a path, whose mean is the sum of the transitions' exact KL along it: no noise of the
draws in it. At the start the gap is the base model's own, log Z_c - beta E_ref[r]; at the target it is 0, and always no
picture's attribute has a law further than sqrt(gap / 2) from the target's, in total variation.

log Z_c is the logarithm of a mean over the base model's pictures, and so too low on average. The jackknife, over the
pictures of a prompt, takes out what is of first order, and gives each picture its part in the figure, paired with the
policy's picture of the same noise: the interval is that of a mean (metrics.py), its upper end moved by what was taken
out, since about as much may be left. Where pictures are too few for Z_c (tilts.known) no gap is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evaluation import tilts
from evaluation.metrics import Interval, strata, student_interval

if TYPE_CHECKING:
    from evaluation.image_sets import Evaluated

UNMEASURED = "the samplers gave no densities of the base model"


def measure(now: Evaluated, base: Sequence[np.ndarray], exponent: float | None, why: str = "") -> dict[str, Any]:
    """Of judged pictures and the rewards [n] of the base model's: of the same noise first, then perhaps of other. What
    is not known is None. Nats:

    gap, gap_low, gap_high  to the target with this `exponent` (None: there is none, `why`), mean over pictures
    base_gap                the base model's own
    no_gap                  why there is no gap; else None
    bound                   on the total variation between any attribute's law and the target's
    explained               share of Var(beta r) within prompts that Delta explains: 1 at the target, below 0 where the
                            policy moved in ways that the reward does not ask for
    ess                     effective sample size of the base model's pictures under the target, a prompt's, mean
    nats, nats_low, ..high  from the base model: mean KL of a path; nats_by_transition: of each transition
    gain, ideal_gain        mean reward above the base model's, and that of the ideal tilt at the same nats
    """
    figures: dict[str, Any] = dict.fromkeys(
        ("gap", "gap_low", "gap_high", "base_gap", "bound", "explained", "ess", "nats", "nats_low", "nats_high",
         "nats_by_transition", "gain", "ideal_gain")
    )  # fmt: skip
    if now.kl is None or now.log_ratio is None:
        return {**figures, "no_gap": UNMEASURED}
    kept = np.isfinite(np.stack([now.rewards, now.log_ratio, now.kl.sum(1), *base])).all(0)
    if not kept.any():
        return {**figures, "no_gap": "no picture is good"}
    path = now.kl[kept].sum(1, dtype=np.float64)
    low, high = student_interval(path, strata(now.prompts, kept))
    figures |= {"nats": float(path.mean()), "nats_low": float(np.maximum(0.0, low)), "nats_high": high}
    figures["nats_by_transition"] = now.kl[kept].mean(0, dtype=np.float64).tolist()
    figures["gain"] = float((now.rewards - base[0])[kept].mean())
    groups = np.unique(np.asarray(now.prompts, object)[kept], return_inverse=True)[1]
    several = np.bincount(groups)[groups] > 1
    if not several.any():
        return {**figures, "no_gap": why if exponent is None else "no prompt has two good pictures"}
    kept[kept], groups, path = several, np.unique(groups[several], return_inverse=True)[1], path[several]
    rewards, pool, places = now.rewards[kept], np.stack([part[kept] for part in base]), np.tile(groups, len(base))
    figures["ideal_gain"] = tilts.ideal_gain(pool.ravel(), places, figures["nats"])
    if exponent is None:
        return {**figures, "no_gap": why}
    value, (low, high), own, size = gap(exponent, rewards, path, groups, pool)
    figures |= {"ess": size, "explained": explained(exponent * rewards, now.log_ratio[kept], groups)}
    if not tilts.known(pool.ravel(), places, exponent):
        count = f"{len(places) / (groups.max() + 1):.3g} base pictures of a prompt"
        return {**figures, "no_gap": f"too few pictures: {count} count as {size:.2g} under the target"}
    bound = min(1.0, math.sqrt(max(0.0, high) / 2))
    return {**figures, "gap": value, "gap_low": low, "gap_high": high, "base_gap": own, "bound": bound, "no_gap": None}


def gap(
    exponent: float, rewards: np.ndarray, path: np.ndarray, groups: np.ndarray, pool: np.ndarray
) -> tuple[float, Interval, float, float]:
    """Of n policy's pictures with their rewards [n] and paths' KL [n], in prompts `groups` [n] with at least two each,
    and K base pictures for each of them [K, n]: the gap, its interval and the base model's own, in nats, and the mean
    effective sample size of a prompt."""
    values, places = exponent * pool.astype(np.float64), np.tile(groups, len(pool))
    counts = np.bincount(places)
    most = np.full(len(counts), -np.inf)
    np.maximum.at(most, places, values.ravel())
    raised = np.exp(values - most[groups])
    total, count = np.bincount(places, raised.ravel())[groups], counts[groups]
    whole = np.log(total / count)
    # Of the others alone: never 0, whatever rounding makes of it.
    others = np.maximum(total - raised, 1e-300)
    parts = count * whole - (count - 1) * np.log(others / (count - 1)) + most[groups]  # [K, n], each picture's log Z
    log_z = parts.mean(0)
    sizes = tilts.sample_sizes(tilts.weights(pool.ravel(), places, exponent), places)
    each = log_z - exponent * rewards + path
    low, high = student_interval(each, groups)
    moved = max(0.0, float((log_z - whole - most[groups]).mean()))
    own = float((log_z - values[0]).mean())  # at the same noise
    return float(each.mean()), (low, high + moved), own, float(sizes.mean())


def explained(target: np.ndarray, log_ratio: np.ndarray, groups: np.ndarray) -> float | None:
    """1 - Var(target - log_ratio) / Var(target) within groups, of [n] each; None where the target does not vary."""

    def variance(values: np.ndarray) -> float:
        return float(((values - (np.bincount(groups, values) / np.bincount(groups))[groups]) ** 2).sum())

    whole = variance(target.astype(np.float64))
    return 1 - variance(target.astype(np.float64) - log_ratio) / whole if whole > 0 else None


def judgement(now: Evaluated, base: Sequence[np.ndarray], exponent: float | None, why: str = "") -> dict[str, Any]:
    """As `measure`, in the form of image_sets.compare's figures: gap and nats, {value, low, high, base}; and the others
    under `certificate`, with the exponent."""
    found = measure(now, base, exponent, why)
    gap_, nats = (
        {"value": found.pop(name), "low": found.pop(f"{name}_low"), "high": found.pop(f"{name}_high"), "base": own}
        for name, own in (("gap", found.pop("base_gap")), ("nats", 0.0))
    )
    return {"gap": _or_none(gap_), "nats": _or_none(nats), "certificate": {"exponent": exponent, **found}}


def _or_none(figure: dict[str, float | None]) -> dict[str, float | None] | None:
    known = {name: value if value is None or math.isfinite(value) else None for name, value in figure.items()}
    return known if known["value"] is not None else None
