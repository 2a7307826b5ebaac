"""What the report says in words and figures, from the run's records alone."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from evaluation.metrics import paired_interval
from learner.config import Config
from learner.objectives.by_name import target
from learner.protocol.quarantine import FOLDER as QUARANTINE
from records.heartbeat import look
from records.run_folder import BEFORE, EVALUATION, Records
from records.storage import Storage, StorageError

Line = dict[str, Any]  # of metrics.jsonl
SHOWN = 8  # reasons and events in the page
STATES = {  # of records/heartbeat.py, where its name alone would not do
    **{state: f"{state} when this page was made" for state in ("starting", "running")},
    "silent": "no sign of life when this page was made", "gone": "ended without a word", "unknown": "not finished",
}  # fmt: skip
FIGURES = {  # of evaluation/step-N.json: name, and what it is
    "reward": ("Reward", "mean over the evaluated pictures"),
    "accuracy": ("Accuracy", "share of pictures that are right"),
    "vendi": ("Vendi score", "effective number of different pictures"),
    "vendi_per_prompt": ("Vendi score of a prompt", "the same among one prompt's pictures, mean over prompts"),
    "distance": ("Distance within a prompt", "mean cosine distance of two pictures' features"),
    "fid": ("Drift (FID)", "Frechet distance from the base model's pictures"),
    "kid": ("Drift (KID)", "kernel distance from the base model's pictures"),
    "fid_per_prompt": ("Drift of a prompt (FID)", "the same among one prompt's pictures, mean over prompts"),
}
NUMBERS = "value", "low", "high", "base", "floor", "gain", "gain_low", "gain_high"  # of each


@dataclass(frozen=True)
class Change:
    """Mean reward of the same `images` before and after `epoch` epochs, and the interval of its change. `bad` images,
    without a reward on either side, are left out. `verdict`: rose, fell or unclear."""

    before: float
    after: float
    gain: float
    low: float
    high: float
    images: int
    bad: int
    epoch: int
    verdict: str


def changes(records: Records, evaluated: Sequence[int]) -> dict[str, Change]:
    """Of the reward (by the label "") and of each one that was not trained on, from before training until the last
    evaluation. Empty before there are both; a reward without images that are good in both is left out."""
    if len(evaluated) < 2 or evaluated[0] != BEFORE:
        return {}
    columns = [fixed_images(records, epoch) for epoch in (BEFORE, evaluated[-1])]
    sides = [{"": side["reward"], **(side.get("held_out") or {})} for side in columns]
    found = {}
    for label in (label for label in sides[0] if label in sides[1]):
        before, after = (np.asarray(side[label], np.float64) for side in sides)
        good = ~np.isnan(before) & ~np.isnan(after)
        if good.any():
            low, high = paired_interval(before, after)
            verdict = "rose" if low > 0 else "fell" if high < 0 else "unclear"
            was, now, count = float(before[good].mean()), float(after[good].mean()), int(good.sum())
            epoch = evaluated[-1] + 1
            found[label] = Change(was, now, now - was, low, high, count, len(good) - count, epoch, verdict)
    return found


def fixed_images(records: Records, epoch: int) -> dict[str, Any]:
    """Columns prompt and reward, and by label held_out, of the fixed images after an epoch."""
    name = "epoch-before" if epoch == BEFORE else f"epoch-{epoch:06d}"
    columns: dict[str, Any] = json.loads(records.storage.read(f"{EVALUATION}/{name}.json"))
    return columns


def state(storage: Storage) -> dict[str, Any]:
    """All that records/heartbeat.py knows of the run, and `in_words` what state it is in."""
    try:
        known = look(storage, time.time())
    except (StorageError, AttributeError, LookupError, TypeError, ValueError):  # its view is damaged, the records not
        known = {"state": "unknown", "lora": None}
    return {**known, "in_words": STATES.get(known["state"], known["state"])}


def towards(config: Config) -> str:
    """What the run trains towards, as a formula in words."""
    return target(config.objective)


def collapse(lines: Sequence[Line]) -> tuple[list[tuple[int, str]], str | None]:
    """Warnings as (epochs done, text), and where there are evaluations but no warning, that in words."""
    warnings = [(line["epoch"] + 1, str(line["collapse"])) for line in lines if line.get("collapse")]
    count = sum(line["epoch"] != BEFORE and line.get("eval_reward_mean") is not None for line in lines)
    if warnings or not count:
        return warnings, None
    text = f"No sign of collapse in {count} evaluation{'s' if count > 1 else ''}"
    measured = any(line.get("eval_vendi") is not None for line in lines)
    return [], text + ("." if measured else ", by the reward alone: diversity was not measured.")


def timings(trained: Sequence[Line], overlap: bool) -> list[tuple[str, float, float]]:
    """What the epochs' time goes into, parts that follow each other: (name, seconds in the median epoch, share of all
    epochs' seconds). With `overlap` sampling and scoring count from the epoch's start, and scoring is what comes after
    the last sample."""
    rows = []
    for line in trained:
        sample, score, train = (line.get(f"{name}_seconds") or 0.0 for name in ("sample", "score", "train"))
        score = max(0.0, score - sample) if overlap else score
        rows.append((sample, score, train, max(0.0, (line.get("seconds") or 0.0) - sample - score - train)))
    names = "sampling", "scoring after the last sample" if overlap else "scoring", "training", "evaluation and the rest"
    total = sum(map(sum, rows)) or 1.0
    return [(names[i], median(column), sum(column) / total) for i, column in enumerate(zip(*rows, strict=True))]


def throughput(trained: Sequence[Line]) -> tuple[float | None, float]:
    """(trajectories a second of the median epoch, seconds of all epochs)."""
    rates = [line["trajectories"] / line["seconds"] for line in trained if line.get("seconds")]
    return (median(rates) if rates else None), sum(line.get("seconds") or 0.0 for line in trained)


def faults(records: Records, trained: Sequence[Line], known: dict[str, Any]) -> dict[str, Any]:
    """Trajectories lost and set aside, the first reasons, and the last events of status.json as (time, text)."""
    names = [name for name in records.storage.entries(QUARANTINE) if name.endswith(".json")]
    reasons, events = [], []
    for name in names[:SHOWN]:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            bad = json.loads(records.storage.read(f"{QUARANTINE}/{name}"))
            reasons.append((bad["epoch"] + 1, bad["trajectory_id"], str(bad["prompt"]), str(bad["reason"])))
    for event in (known.get("last_events") or [])[-SHOWN:]:
        with contextlib.suppress(LookupError, TypeError, ValueError, OverflowError):
            events.append((clock(event["time"]), str(event["text"])))
    counts = (sum(line.get(key) or 0 for line in trained) for key in ("lost_trajectories", "quarantined"))
    further = max(0, len(names) - len(reasons))
    keys = "lost", "quarantined", "reasons", "further", "events", "event_count"
    return dict(zip(keys, (*counts, reasons, further, events, known.get("events") or 0), strict=True))


def figures(storage: Storage, until: int | None = None) -> tuple[int, list[dict[str, Any]]] | None:
    """(policy updates, rows) of the newest evaluation/step-N.json, until step `until`. A row has `name`, `meaning` and,
    by name, NUMBERS; what is not known is None. `gain` over the base model is of the same noise.

    Raises:
        StorageError: it is damaged.
    """
    names = [name for name in storage.entries(EVALUATION) if name.startswith("step-") and name.endswith(".json")]
    steps = {int(name[5:-5]): f"{EVALUATION}/{name}" for name in names if name[5:-5].isdigit()}
    step = max((step for step in steps if until is None or step <= until), default=None)
    if step is None:
        return None
    try:
        tree = json.loads(storage.read(steps[step]))
        measured = [(*words, tree.get(key)) for key, words in FIGURES.items()]
        others = (tree.get("held_out") or {}).items()
        measured += [(f"Held out: {label}", "a reward not trained on", figure) for label, figure in others]
    except (ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"{steps[step]} in {storage} is damaged ({error}): remove it, or evaluate again") from error
    rows = [
        {"name": name, "meaning": meaning} | {key: _number(figure.get(key)) for key in NUMBERS}
        for name, meaning, figure in measured
        if isinstance(figure, dict)
    ]
    return step, [row for row in rows if row["value"] is not None]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def number(value: float | None, sign: bool = False, like: float | None = None) -> str:
    """For people: about four figures, or to as many places as `like` has; a true minus sign; a dash for what is not
    known."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value if like is None else like)
    digits = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
    text = f"{value:.2e}" if 0 < size < 0.001 or size >= 1e6 else f"{value:,.{digits}f}"
    text = text if text.strip("-0.,") else text.lstrip("-")
    return ("+" if sign and text.strip("0.,") and not text.startswith("-") else "") + text.replace("-", "−")


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))
