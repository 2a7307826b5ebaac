"""The last lines of a run, for somebody who sees one for the first time: what it was trained towards, what changed and
whether that is more than chance, where everything is, and what to type next. From the run's records alone."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np

from learner.config import Config
from records.run_folder import BEFORE, Records
from reports import facts
from reports.facts import Change

VERDICTS = {
    "rose": "it rose by more than chance",
    "fell": "it FELL by more than chance",
    "unclear": "this may be chance, the interval holds 0",
}
# Of rewards that say of each picture whether it is right: what the share of these is called.
SHARES = {"shapes_accuracy": "pictures that show exactly what their prompt says"}
IMAGES = 128  # that learner.evaluate is to draw where the run itself drew none


def describe(records: Records, config: Config) -> list[str]:
    """What was trained and what came of it, a line each."""
    evaluated = records.evaluated()
    lines = [f"trained: {trained(records, config)}"]
    changes = facts.changes(records, evaluated)
    change = changes.pop("", None)
    if change is None:
        why = "evaluation.images=0" if not evaluated else "too few evaluations, or only bad images"
        return [*lines, f"not judged ({why}): whether the reward rose is not known; learner.evaluate, below, finds out"]
    lines.append(_reward(change))
    for label, other in changes.items():
        form = ".0%" if label in SHARES else ".3f"
        name = SHARES.get(label, f"{label}, not trained on")
        lines.append(f"{name}: {other.before:{form}} -> {other.after:{form}}")
    return [*lines, *_diversity(records), *_collapse(records)]


def trained(records: Records, config: Config) -> str:
    done = sum(line["epoch"] != BEFORE for line in records.lines)
    count = f"{done} epoch{'' if done == 1 else 's'} of {config.train.trajectories} pictures"
    if config.train.shuffle_rewards:
        return f"nothing to learn from, as rewards were shuffled (train.shuffle_rewards: a control); {count}"
    goal = f"towards pictures that {config.reward.name} scores higher"
    return f"{goal}; {count}; {config.objective.kind}: {facts.towards(config)}"


def _reward(change: Change) -> str:
    bad = f" ({change.bad} bad ones left out)" if change.bad else ""
    return (
        f"evaluated reward {change.before:.3f} -> {change.after:.3f} on {change.images} fixed images{bad}: "
        f"{change.gain:+.3f}, 95 % interval {change.low:+.3f} to {change.high:+.3f}: {VERDICTS[change.verdict]}"
    )


def _diversity(records: Records) -> list[str]:
    values = [line["eval_distance"] for line in records.lines if line.get("eval_distance") is not None]
    if len(values) < 2 or not values[0] > 0 or not np.isfinite(values[-1]):
        return []
    kept = values[-1] / values[0]
    return [f"diversity among a prompt's pictures: {values[0]:.3g} -> {values[-1]:.3g}, {kept:.0%} of what it was"]


def _collapse(records: Records) -> list[str]:
    """Of all evaluations, not of the last alone: a run that got over it is worth a look too."""
    warnings, none = facts.collapse(records.lines)
    if warnings:
        epoch, text = warnings[-1]
        return [f"SIGNS OF COLLAPSE after epoch {epoch}: {text}. Look at the pictures before you use this LoRA"]
    return [f"{none[0].lower()}{none[1:].removesuffix('.')}"] if none else []


def next_commands(records: Records, config: Config) -> list[str]:
    """What to type now, with this run's path."""
    run, python, images, prompt = shlex.quote(str(records.storage)), interpreter(), "", ""
    if not config.evaluation.images:
        chunk = config.sampler.chunk_size
        images = f" --images {-(-IMAGES // chunk) * chunk}"  # whole chunks
    if config.prompts.path is not None:
        evaluated = records.evaluated()
        first = records.evaluation(evaluated[-1])["prompt"][0] if evaluated else "what to draw"
        prompt = f" --prompt {shlex.quote(first)}"
    return [
        "next:",
        f"  {python} -m learner.evaluate {run}{images}   # beside what noise alone would do",
        f"  {python} -m learner.generate --lora {run}{prompt}   # base and tuned, the same noise: grid.png",
        f"  {python} -m learner.compare {run} OTHER_RUN{images}   # once there is another run",
    ]


def interpreter() -> str:
    """This Python, as briefly as a shell here would find it: `make` calls it without an activated environment."""
    found = shutil.which("python")
    if found and os.path.abspath(found) == os.path.abspath(sys.executable):
        return "python"
    path = Path(sys.executable)
    inside = path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if inside else path))
