"""Early warning of reward collapse: the trained reward rises, and what it was not to cost falls.

Judged on the fixed evaluation images against the same images before training, so noise cancels: diversity among a
prompt's images, and every held-out reward. Both thresholds are judgement calls, measured on the embedded model
(docs/results.md); a warning is a reason to look at the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.metrics import mean_of_good, paired_interval, prompt_distances

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
    """The signs of collapse, in words; empty while there are none.

    A fall counts if its paired 95 % interval lies below 0, it is large (KEPT, FALL), and the trained reward's own lies
    above 0.
    """
    if not paired_interval(before.rewards, now.rewards)[0] > 0:
        return []
    signs_seen = []
    if before.features is not None and now.features is not None:
        was, is_now = prompt_distances(before.features, before.prompts), prompt_distances(now.features, now.prompts)
        both = ~np.isnan(was) & ~np.isnan(is_now)
        kept = float(is_now[both].mean() / was[both].mean()) if both.any() and was[both].mean() > 0 else 1.0
        if kept < KEPT and paired_interval(was, is_now)[1] < 0:
            signs_seen.append(f"diversity fell to {kept:.0%} of the base model's")
    for label, was in before.held_out.items():
        fell = mean_of_good(now.held_out[label] - was)
        if paired_interval(was, now.held_out[label])[1] < 0 and -fell > FALL * np.nanstd(was):
            signs_seen.append(f"held-out {label} fell by {-fell:.3g} to {mean_of_good(now.held_out[label]):.3g}")
    return signs_seen
