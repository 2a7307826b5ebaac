"""What a run's records say of it: figures, computed once for page, terminal and model card; and the last lines in the
terminal, for somebody who sees a run for the first time: what changed, by more than chance or not, and what to type."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from evaluation.metrics import paired_interval
from learner.config import Config, as_arguments
from learner.protocol.quarantine import FOLDER as QUARANTINE
from records.heartbeat import look
from records.passwords import without_passwords
from records.run_folder import BEFORE, EVALUATION, Records
from records.shapes import Judgement, SetAside
from records.storage import Storage, StorageError
from records.words import PROMPT, short
from reports import targets

Line = dict[str, Any]  # of metrics.jsonl
SHOWN = 8  # reasons and events in the page
STATES = {  # of records/heartbeat.py, where its name alone would not do
    **{state: f"{state} when this page was made" for state in ("starting", "running")},
    "silent": "no sign of life when this page was made", "gone": "ended without a word", "unknown": "not finished",
}  # fmt: skip
FIGURES = {  # of evaluation/step-*.json: name, and what it is
    "reward": ("Reward", "mean over the evaluated pictures"),
    "accuracy": ("Accuracy", "share of pictures that are right"),
    "vendi": ("Vendi score", "effective number of different pictures"),
    "distance": ("Distance within a prompt", "mean cosine distance of two pictures' features"),
    "fid": ("Drift (FID)", "Frechet distance from the base model's pictures"),
    "kid": ("Drift (KID)", "kernel distance from the base model's pictures"),
    "gap": ("Gap to the target", "nats that are left to what the objective aims at"),
    "nats": ("Nats from the base", "mean KL of a path to the base model"),
}
NUMBERS = "value", "low", "high", "base", "floor", "floor_high", "gain", "gain_low", "gain_high"  # of each
VERDICTS = {
    "rose": "it rose by more than chance",
    "fell": "it FELL by more than chance",
    "unclear": "this may be chance, the interval holds 0",
    "unknown": "too few images to tell it from chance",
}
# Of rewards that say of each picture whether it is right: what the share of these is called.
SHARES = {"shapes_accuracy": "pictures that show exactly what their prompt says"}
IMAGES = 128  # that learner.evaluate is to draw where the run itself drew none


@dataclass(frozen=True)
class Change:
    """Mean reward of the same `images` before and after `epoch` epochs, and the interval of its change. `bad` images,
    without a reward on either side, are left out. `verdict`: of VERDICTS."""

    before: float
    after: float
    gain: float
    low: float
    high: float
    images: int
    bad: int
    epoch: int
    verdict: str


class Facts:
    """Of a run, or of its first `epochs` epochs."""

    def __init__(self, records: Records, config: Config, epochs: float = math.inf) -> None:
        from learner.objectives.by_name import target  # here: torch comes with it

        self.records, self.config = records, config
        self.lines = [line for line in records.lines if line["epoch"] < epochs]
        self.trained = [line for line in self.lines if line["epoch"] != BEFORE]
        self.evaluated = [epoch for epoch in records.evaluated() if epoch < epochs]
        judged = {line["epoch"] for line in self.lines if line.get("eval_reward_mean") is not None}
        if gone := judged - {*self.evaluated}:
            records.warn(f"{EVALUATION}/ in {records.storage} lacks {len(gone)} of {len(judged)} evaluations: left out")
        self.towards = target(config, records.about.get("dimensions"))  # a formula in words
        keys = "seconds", "trajectories", "lost_trajectories", "quarantined"  # in the lines
        self.seconds, self.trajectories, self.lost, self.set_aside = (
            sum(line.get(key) or 0 for line in self.trained) for key in keys
        )
        rates = [line["trajectories"] / line["seconds"] for line in self.trained if line.get("seconds")]
        self.rate = median(rates) if rates else None  # trajectories a second of the median epoch

    def changes(self, epoch: int | None = None) -> dict[str, Change]:
        """Of the reward (by the label "") and of each one that was not trained on, from before training until an
        evaluated epoch, the last by default. Empty before there are both; a reward without images that are good in both
        is left out."""
        epoch = self.evaluated[-1] if epoch is None and self.evaluated else epoch
        if epoch in (None, BEFORE) or BEFORE not in self.evaluated:
            return {}
        before, after = (self.records.evaluation(number) for number in (BEFORE, epoch))
        if before["prompt"] != after["prompt"]:
            fault = f"{EVALUATION}/ in {self.records.storage} has other prompts before and after training"
            raise StorageError(f"{fault}: put it back from a copy, or remove one")
        pairs = {"": (before["reward"], after["reward"])}
        labels = (label for label in before.get("held_out", {}) if label in after.get("held_out", {}))
        pairs |= {label: (before["held_out"][label], after["held_out"][label]) for label in labels}
        changes = {}
        for label, sides in pairs.items():
            was, now = (np.asarray(side, np.float64) for side in sides)
            low, high = paired_interval(was, now, before["prompt"])
            verdict = "rose" if low > 0 else "fell" if high < 0 else "unclear" if low <= high else "unknown"
            good = ~np.isnan(was - now)
            if count := int(good.sum()):
                first, last, bad = float(was[good].mean()), float(now[good].mean()), len(good) - count
                changes[label] = Change(first, last, last - first, low, high, count, bad, epoch + 1, verdict)
        return changes

    def collapse(self) -> tuple[list[tuple[int, str]], str | None]:
        """Warnings as (epochs done, text), and where there are evaluations but no warning, that in words."""
        warnings = [(line["epoch"] + 1, str(line["collapse"])) for line in self.lines if line.get("collapse")]
        count = sum(line.get("eval_reward_mean") is not None for line in self.trained)
        if warnings or not count:
            return warnings, None
        text = f"No sign of collapse in {plural(count, 'evaluation')}"
        measured = any(line.get("eval_distance") is not None for line in self.trained)
        return [], text + ("." if measured else ", by the reward alone: diversity was not measured.")

    def diversity(self) -> str | None:
        """How the distance within a prompt has changed, or why that is not known; None where nothing was evaluated."""
        seen = [line.get("eval_distance") for line in self.lines if line.get("eval_reward_mean") is not None]
        if len(seen) < 2:
            return None
        if (first := seen[0]) is None or (last := seen[-1]) is None:
            return "not known, no prompt has two good pictures; more evaluation.images, or fewer evaluation.prompts"
        return f"{first:.3g} -> {last:.3g}" + (f", {last / first:.0%} of what it was" if first > 0 else "")

    def timings(self) -> list[tuple[str, float, float]]:
        """What the epochs' time goes into: (name, seconds of all epochs, their share)."""
        parts = [seconds_of(line, self.config) for line in self.trained]
        totals = {name: sum(part[name] for part in parts) for name in (parts[0] if parts else ())}
        return [(name, seconds, seconds / (sum(totals.values()) or 1.0)) for name, seconds in totals.items()]

    def reasons(self) -> tuple[list[tuple[int, int, str, str]], int]:
        """Of the first trajectories that were set aside (epoch, number, prompt, why); how many more there are."""
        names = [name for name in self.records.storage.entries(QUARANTINE) if name.endswith(".json")]
        reasons = []
        for name in names[:SHOWN]:
            try:
                bad = self.records.storage.read_json(f"{QUARANTINE}/{name}", SetAside)
                reasons.append((bad["epoch"] + 1, bad["trajectory_id"], short(bad["prompt"], PROMPT), bad["reason"]))
            except StorageError as error:
                self.records.warn(str(error))
        return reasons, len(names) - len(reasons)

    def settings(self) -> str:
        """Every one as YAML, for others to read: URLs without their passwords."""
        tree = self.config.model_dump(mode="json")  # no line is folded: a password may not be cut in two
        return without_passwords(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=10**6))


def seconds_of(line: Line, config: Config) -> dict[str, float]:
    """Of an epoch's seconds, what each part took, one after the other: they add up. On Ray sampling and scoring go on
    side by side, both counted from the epoch's start: there scoring is what comes after the last sample."""
    keys = "sample", "score", "train", "evaluate"
    sample, score, train, evaluate = (line.get(f"{name}_seconds") or 0.0 for name in keys)
    score = max(0.0, score - sample) if config.run.runner == "ray" else score
    rest = max(0.0, (line.get("seconds") or 0.0) - sample - score - train - evaluate)
    return {"sampling": sample, "scoring": score, "training": train, "evaluation": evaluate, "the rest": rest}


def state(records: Records) -> dict[str, Any]:
    """All that records/heartbeat.py knows of the run, and `in_words` what state it is in."""
    known = look(records.storage, time.time(), records.warn)
    return {**known, "in_words": STATES.get(known["state"], known["state"])}


def judgements(storage: Storage) -> dict[int, str]:
    """What commands/evaluate.py left, evaluation/step-*.json by step, the newest last: that of most pictures."""
    found = (re.fullmatch(r"step-(\d+)-(\d+)-images-\w+\.json", name) for name in storage.entries(EVALUATION))
    names = sorted((int(match[1]), int(match[2]), match[0]) for match in found if match)
    return {step: f"{EVALUATION}/{name}" for step, _, name in names}


def figures(records: Records, until: float = math.inf) -> tuple[int, list[dict[str, Any]], dict[str, Any]] | None:
    """(policy updates, `rows`, the judgement) of the newest one that is whole, until step `until`."""
    for step, place in reversed(judgements(records.storage).items()):
        if step <= until and (judgement := judgement_in(records, place)):
            return step, rows(judgement), judgement
    return None


def judgement_in(records: Records, place: str) -> dict[str, Any] | None:
    """What commands/evaluate.py left there; None, and a warning, where that is damaged."""
    try:
        return records.storage.read_json(place, Judgement, "it is left out; evaluate again, or remove it")
    except StorageError as error:
        records.warn(str(error))
        return None


def rows(judgement: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each figure its `key`, `name` and `meaning`, and by name NUMBERS; what is not known is None. `gain` over the
    base model is of the same noise."""
    measured = [(key, *words, judgement.get(key)) for key, words in FIGURES.items()]
    others = (judgement.get("held_out") or {}).items()
    measured += [(f"held_out/{key}", f"Held out: {key}", "a reward not trained on", figure) for key, figure in others]
    table = [
        {"key": key, "name": name, "meaning": meaning} | {number: figure.get(number) for number in NUMBERS}
        for key, name, meaning, figure in measured
        if isinstance(figure, dict)
    ]
    return [row for row in table if row["value"] is not None]


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


def ascii_number(value: float | None) -> str:
    """The same for terminals that know no other minus."""
    return number(value).replace("−", "-").replace("–", "not known")


def alike(*values: float) -> list[str]:
    """Differences with their signs, to the same places: three, or as many as show of each that it is not 0."""
    least = min((abs(value) for value in values if value and math.isfinite(value)), default=1.0)
    digits = max(3, -math.floor(math.log10(least)))
    form = f"+.{digits}f" if digits < 10 else "+.2g"
    return [f"{value:{form}}" if value else f"{0:.3f}" for value in values]


def plural(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))


def describe(records: Records, config: Config) -> list[str]:
    """What was trained and what came of it, a line each."""
    facts = Facts(records, config)
    done = len(facts.trained)
    count = f"{plural(done, 'epoch')} of {plural(config.train.trajectories, 'picture')}"
    words = f"{count}; {config.objective.kind}: {facts.towards}"
    goal = f"towards pictures that {config.reward.name} scores higher; {words}"
    if config.train.shuffle_rewards:
        goal = f"nothing to learn from, as rewards were shuffled (train.shuffle_rewards: a control); {count}"
    changes = facts.changes()
    change = changes.pop("", None)
    if change is None:
        why = "too few evaluations, or only bad images" if facts.evaluated else "evaluation.images=0"
        unknown = f"not judged ({why}): whether the reward rose is not known; learner.evaluate, below, finds out"
        return [f"trained: {goal}", unknown]
    bad = f" ({change.bad} bad ones left out)" if change.bad else ""
    gain, low, high = alike(change.gain, change.low, change.high)
    lines = [
        f"trained: {goal}",
        f"evaluated reward {ascii_number(change.before)} -> {ascii_number(change.after)} "
        f"on {plural(change.images, 'fixed image')}{bad}: "
        f"{gain}{f', 95 % interval {low} to {high}' * (change.verdict != 'unknown')}: {VERDICTS[change.verdict]}",
    ]
    for label, other in changes.items():
        form, name = (".0%", SHARES[label]) if label in SHARES else (".3f", f"{label}, not trained on")
        lines.append(f"{name}: {other.before:{form}} -> {other.after:{form}}")
    lines += [f"diversity among a prompt's pictures: {text}"] if (text := facts.diversity()) else []
    lines += targets.of_lines(facts.lines)
    lines += [targets.of_targets(judged[1])] if (judged := targets.newest(records)) else []
    warnings, none = facts.collapse()
    if warnings:  # of all evaluations, not of the last alone: a run that got over it is worth a look too
        epoch, text = warnings[-1]
        lines.append(f"SIGNS OF COLLAPSE after epoch {epoch}: {text}. Look at the pictures before you use this LoRA")
    return [*lines, f"{none[0].lower()}{none[1:].removesuffix('.')}"] if none else lines


def next_commands(records: Records, config: Config) -> list[str]:
    """What to type now, with this run's path."""
    own = f" {arguments}" if (arguments := as_arguments(config.own_code)) else ""  # such code runs where it is named
    run, python, images, prompt = shlex.quote(str(records.storage)), interpreter(), "", ""
    if not config.evaluation.images:
        chunk = config.sampler.chunk_size
        images = f" --images {-(-IMAGES // chunk) * chunk}"  # whole chunks
    if config.prompts.path is not None:
        evaluated = records.evaluated()
        drawn = records.evaluation(evaluated[-1])["prompt"] if evaluated else []
        fit = (text for text in drawn if text.isprintable() and len(text) <= PROMPT)
        prompt = f" --prompt {shlex.quote(next(fit, 'what to draw'))}"
    commands = [
        f"  {python} -m learner.evaluate {run}{images}{own}   # beside what noise alone would do",
        f"  {python} -m learner.generate --lora {run}{prompt}   # base and tuned, the same noise: grid.png",
        f"  {python} -m learner.compare {run} OTHER_RUN{images}{own}   # once there is another run",
    ]
    module, _, function = config.reward.name.rpartition(":")
    if module == "__main__" or "<" in function:
        why = "learner.evaluate and learner.compare cannot import this run's reward: put the function into a file"
        commands = [commands[1], f"  ({why}, and add reward.name=FILE.py:FUNCTION)"]
    return ["next:", *commands]


def interpreter() -> str:
    """This Python, as briefly as a shell here would find it: `make` calls it without an activated environment."""
    in_path, path = shutil.which("python"), Path(sys.executable)
    if in_path and os.path.abspath(in_path) == os.path.abspath(path):
        return "python"
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
