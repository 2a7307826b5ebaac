"""What the fixed evaluation images of a run say of an epoch, and the early warning of reward collapse among it: the
trained reward rises, and what it was not to cost falls.

Judged against the same images before training, so noise cancels: diversity among a prompt's images, and every held-out
reward. Both thresholds are judgement calls, measured on the embedded model (docs/results.md); a warning is a reason to
look at the pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffusion.trajectory import Scores
from evaluation import certificate
from evaluation.image_sets import Evaluated, image_rows, read_images
from evaluation.metrics import distance, mean_of_good, paired_interval, vendi
from learner.config import Config
from learner.objectives.by_name import tilt
from records.run_folder import BEFORE, Records
from records.storage import StorageError

KEPT = 0.7  # share of the diversity that may be left before it is collapse
FALL = 0.5  # standard deviations among images that a held-out reward may fall


def judge(
    records: Records, config: Config, draw: Callable[[Sequence[Scores]], bytes], epoch: int, scores: Sequence[Scores],
) -> dict[str, Any]:  # fmt: skip
    """Records the evaluation after an epoch, with a contact sheet (PNG) by `draw`. Returns what a line of metrics.jsonl
    has of it: means of the good images' rewards, diversity, how far the objective's target is (certificate.measure,
    each under eval_...), and signs of collapse since before training. Raises a StorageError if it could not be
    recorded."""
    records.save_evaluation(epoch, image_rows(scores, config.run.thumbnail_pixels), draw(scores))
    now = read_images(*records.images(epoch))
    line: dict[str, Any] = {"eval_reward_mean": mean_of_good(now.rewards)}
    line |= {f"eval_reward_mean/{label}": mean_of_good(values) for label, values in now.held_out.items()}
    if now.features is not None:
        line["eval_vendi"] = vendi(now.features)
        line["eval_distance"] = distance(now.features, now.prompts)[0]
    if BEFORE not in records.evaluated():
        return line
    try:
        before = read_images(*records.images(BEFORE))
    except StorageError as error:
        records.warn(
            f"{error}; until then signs of collapse are not looked for, and the gap to the target is not known"
        )
        return line
    if epoch != BEFORE:
        line["collapse"] = "; ".join(signs(before, now)) or None
    if now.kl is not None:
        target = tilt(config, records.about.get("dimensions"))
        found = certificate.measure(now, [before.rewards], *target)
        line |= {f"eval_{name}": value for name, value in found.items()}
    return line


def signs(before: Evaluated, now: Evaluated) -> list[str]:
    """The signs of collapse, in words; empty while there are none.

    A fall counts if its paired 95 % interval lies below 0, it is large (KEPT, FALL), and the trained reward's own lies
    above 0.
    """
    if not paired_interval(before.rewards, now.rewards, now.prompts)[0] > 0:
        return []
    texts = []
    if before.features is not None and now.features is not None:
        change, _, high = distance(now.features, now.prompts, before.features)
        was, _, _ = distance(np.where(np.isnan(now.features), np.nan, before.features), now.prompts)  # good in both
        if high < 0 < was and 1 + change / was < KEPT:
            texts.append(f"diversity fell to {1 + change / was:.0%} of the base model's")
    for label, was_held in before.held_out.items():
        fell = mean_of_good(now.held_out[label] - was_held)
        high = paired_interval(was_held, now.held_out[label], now.prompts)[1]
        if high < 0 and -fell > FALL * np.nanstd(was_held):
            texts.append(f"held-out {label} fell by {-fell:.3g} to {mean_of_good(now.held_out[label]):.3g}")
    return texts
