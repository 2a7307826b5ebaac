"""Early warning of reward collapse: the trained reward rises, and what it was not to cost falls.

Judged on the fixed evaluation images against the same images before training, so noise cancels: diversity among a
prompt's images, and every held-out reward. Both thresholds are judgement calls, measured on the embedded model
(docs/results.md); a warning is a reason to look at the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.intervals import mean_of_good, paired_interval

KEPT = 0.7  # share of the diversity that may be left before it is collapse
FALL = 0.5  # standard deviations among images that a held-out reward may fall


@dataclass(frozen=True)
class Evaluated:
    """The fixed images after some epoch: n of them, NaN where one is bad."""

    prompts: Sequence[str]
    rewards: np.ndarray  # [n], raw, of the reward trained on
    held_out: Mapping[str, np.ndarray]  # [n] each, raw
    features: np.ndarray | None  # [n, F]


def signs(before: Evaluated, now: Evaluated) -> list[str]:
    """What speaks for collapse, in words; empty while nothing does.

    A fall counts if its paired 95 % interval lies below 0, it is large (KEPT, FALL), and the trained reward's own lies
    above 0.
    """
    if not paired_interval(before.rewards, now.rewards)[0] > 0:
        return []
    found = []
    if before.features is not None and now.features is not None:
        was, is_now = (apartness(one.features, one.prompts) for one in (before, now))  # type: ignore[arg-type]
        both = ~np.isnan(was) & ~np.isnan(is_now)
        kept = float(is_now[both].mean() / was[both].mean()) if both.any() and was[both].mean() > 0 else 1.0
        if kept < KEPT and paired_interval(was, is_now)[1] < 0:
            found.append(f"diversity fell to {kept:.0%} of the base model's")
    for label, was in before.held_out.items():
        fell = mean_of_good(now.held_out[label] - was)
        if paired_interval(was, now.held_out[label])[1] < 0 and -fell > FALL * np.nanstd(was):
            found.append(f"held-out {label} fell by {-fell:.3g} to {mean_of_good(now.held_out[label]):.3g}")
    return found


def apartness(features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Mean cosine distance [n] of each image to the others of its prompt, or, where no prompt has two, to all others;
    NaN where there is none."""
    groups = np.unique(np.asarray(prompts), return_inverse=True)[1]
    if len(set(groups.tolist())) == len(groups):
        groups = np.zeros_like(groups)
    unit = features.astype(np.float64)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    good = ~np.isnan(unit).any(1)
    unit = np.where(good[:, None], unit, 0.0)
    found = np.full(len(features), np.nan)
    for group in set(groups.tolist()):
        rows = np.flatnonzero((groups == group) & good)
        if len(rows) > 1:
            cosines = unit[rows] @ unit[rows].T
            found[rows] = 1 - (cosines.sum(1) - cosines.diagonal()) / (len(rows) - 1)
    return found
