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
from learner.objectives.by_name import OBJECTIVES
from learner.protocol.quarantine import FOLDER as QUARANTINE
from records.run_folder import BEFORE, EVALUATION, Records
from records.status import look
from records.storage import Storage, StorageError

Line = dict[str, Any]  # of metrics.jsonl
SHOWN = 8  # reasons and events in the page
STATES = {  # of records/status.py
    "starting": "starting when this page was made",
    "running": "running when this page was made",
    "silent": "no sign of life when this page was made",
    "gone": "ended without a word",
    "finished": "finished",
    "failed": "failed",
    "stopped": "stopped",
    "unknown": "not finished",
}
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


@dataclass(frozen=True)
class Headline:
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


@dataclass(frozen=True)
class Part:
    """Of the time: `seconds` in the median epoch, and its share of all epochs' seconds."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True)
class Figure:
    """One row of the evaluation table; what is not known is None. `gain` over the base model is of the same noise."""

    name: str
    meaning: str
    value: float | None
    low: float | None
    high: float | None
    base: float | None
    floor: float | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None


def headline(records: Records, evaluated: Sequence[int]) -> Headline | None:
    """None before there are evaluations before and after, with images that are good in both."""
    if len(evaluated) < 2 or evaluated[0] != BEFORE:
        return None
    before, after = (records.evaluation_rewards(epoch) for epoch in (BEFORE, evaluated[-1]))
    good = ~np.isnan(before) & ~np.isnan(after)
    if not good.any():
        return None
    low, high = paired_interval(before, after)
    verdict = "rose" if low > 0 else "fell" if high < 0 else "unclear"
    was, now = float(before[good].mean()), float(after[good].mean())
    return Headline(was, now, now - was, low, high, int(good.sum()), int((~good).sum()), evaluated[-1] + 1, verdict)


def state(storage: Storage) -> tuple[str, str, str | None, dict[str, Any]]:
    """(state as in records/status.py, in words, why, and all else that it knows)."""
    try:
        found = look(storage, time.time())
    except (StorageError, AttributeError, LookupError, TypeError, ValueError):  # its view is damaged, the records not
        found = {"state": "unknown"}
    return found["state"], STATES.get(found["state"], found["state"]), found.get("reason"), found


def towards(config: Config) -> str:
    """What the run trains towards, as a formula in words."""
    given = config.objective
    if given.kind in ("dag_db", "dag_kl"):
        inner = given.log_prob_reduction == "mean"
        text = f"pictures with a probability proportional to exp({given.beta:g} x {'D x ' if inner else ''}reward)"
        return f"{text}, D being how many numbers a latent has" if inner else text
    return OBJECTIVES[given.kind].target(given, 1)


def collapse(lines: Sequence[Line]) -> tuple[list[tuple[int, str]], str | None]:
    """Warnings as (epochs done, text), and where there are evaluations but no warning, that in words."""
    warnings = [(line["epoch"] + 1, str(line["collapse"])) for line in lines if line.get("collapse")]
    count = sum(line["epoch"] != BEFORE and line.get("eval_reward_mean") is not None for line in lines)
    if warnings or not count:
        return warnings, None
    text = f"No sign of collapse in {count} evaluation{'s' if count > 1 else ''}"
    measured = any(line.get("eval_vendi") is not None for line in lines)
    return [], text + ("." if measured else ", by the reward alone: diversity was not measured.")


def timings(trained: Sequence[Line], overlap: bool) -> list[Part]:
    """What the epochs' time goes into, parts that follow each other. With `overlap` sampling and scoring count from the
    epoch's start, and scoring is what comes after the last sample."""
    if not trained:
        return []
    rows = []
    for line in trained:
        sample, score, train = (line.get(f"{name}_seconds") or 0.0 for name in ("sample", "score", "train"))
        if overlap:
            score = max(0.0, score - sample)
        rows.append((sample, score, train, max(0.0, (line.get("seconds") or 0.0) - sample - score - train)))
    names = "sampling", "scoring after the last sample" if overlap else "scoring", "training", "evaluation and the rest"
    columns = list(zip(*rows, strict=True))
    total = sum(map(sum, columns)) or 1.0
    return [Part(name, median(column), sum(column) / total) for name, column in zip(names, columns, strict=True)]


def throughput(trained: Sequence[Line]) -> tuple[float | None, float]:
    """(trajectories a second of the median epoch, seconds of all epochs)."""
    rates = [line["trajectories"] / line["seconds"] for line in trained if line.get("seconds")]
    return (median(rates) if rates else None), sum(line.get("seconds") or 0.0 for line in trained)


def faults(records: Records, trained: Sequence[Line], known: dict[str, Any]) -> dict[str, Any]:
    """Trajectories lost and set aside, the first reasons, and the last events of status.json as (time, text)."""
    names = [name for name in records.storage.entries(QUARANTINE) if name.endswith(".json")]
    reasons = []
    for name in names[:SHOWN]:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            one = json.loads(records.storage.read(f"{QUARANTINE}/{name}"))
            reasons.append((one["epoch"] + 1, one["trajectory_id"], str(one["prompt"]), str(one["reason"])))
    events = []
    for event in (known.get("last_events") or [])[-SHOWN:]:
        with contextlib.suppress(LookupError, TypeError, ValueError, OverflowError):
            events.append((clock(event["time"]), str(event["text"])))
    return {
        "lost": sum(line.get("lost_trajectories") or 0 for line in trained),
        "quarantined": sum(line.get("quarantined") or 0 for line in trained),
        "reasons": reasons,
        "further": max(0, len(names) - len(reasons)),
        "events": events,
        "event_count": known.get("events") or 0,
    }


def figures(storage: Storage) -> tuple[int, list[Figure]] | None:
    """(policy updates, rows) of the newest evaluation/step-N.json; None without a readable one."""
    numbers = (name.removeprefix("step-").removesuffix(".json") for name in storage.entries(EVALUATION))
    steps = sorted((int(number), number) for number in numbers if number.isdigit())
    for step, number in reversed(steps):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            found = json.loads(storage.read(f"{EVALUATION}/step-{number}.json"))
            held_out = found.get("held_out") or {}
            rows = [_figure(name, meaning, found.get(key)) for key, (name, meaning) in FIGURES.items()]
            rows += [_figure(f"Held out: {label}", "a reward not trained on", one) for label, one in held_out.items()]
            return step, [row for row in rows if row]
    return None


def _figure(name: str, meaning: str, found: Any) -> Figure | None:
    if not isinstance(found, dict) or _number(found.get("value")) is None:
        return None
    keys = "value", "low", "high", "base", "floor", "gain", "gain_low", "gain_high"
    return Figure(name, meaning, *(_number(found.get(key)) for key in keys))


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
