"""The last lines of a run, for somebody who sees one for the first time: what it was trained towards, what changed and
whether that is more than chance, where everything is, and what to type next. From the run's records alone."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from evaluation.fixed_images import read_images
from evaluation.metrics import mean_of_good
from learner.config import Config, resolve
from models.shapes.measure import correct
from models.shapes.world import IMAGE_SIZE, parse
from records.run_folder import BEFORE, Records
from reports import facts
from reports.facts import Headline
from rewards.shapes_accuracy import ShapesAccuracy

VERDICTS = {
    "rose": "it rose by more than chance",
    "fell": "it FELL by more than chance",
    "unclear": "this may be chance, the interval holds 0",
}
IMAGES = 128  # that learner.evaluate is to draw where the run itself drew none


def describe(records: Records, config: Config) -> list[str]:
    """What was trained and what came of it, a line each."""
    there = records.evaluated()
    lines = [f"trained: {trained(records, config)}"]
    found = facts.headline(records, there)
    if found is None:
        why = "evaluation.images=0" if not there else "too few evaluations, or only bad images"
        return [*lines, f"not judged ({why}): whether the reward rose is not known; learner.evaluate, below, finds out"]
    lines.append(_reward(found))
    share = None
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, SyntaxError):  # pictures missing or damaged
        share = accuracy(records, config, there)
    if share is not None:
        lines.append(f"pictures that show exactly what their prompt says: {share[0]:.0%} -> {share[1]:.0%}")
    lines += _diversity(records)
    return [*lines, *_collapse(records)]


def trained(records: Records, config: Config) -> str:
    done = sum(line["epoch"] != BEFORE for line in records.lines)
    count = f"{done} epoch{'' if done == 1 else 's'} of {config.train.trajectories} pictures"
    if config.train.shuffle_rewards:
        return f"nothing to learn from, as rewards were shuffled (train.shuffle_rewards: a control); {count}"
    goal = f"towards pictures that {config.reward.name} scores higher"
    return f"{goal}; {count}; {config.objective.kind}: {facts.towards(config)}"


def _reward(found: Headline) -> str:
    bad = f" ({found.bad} bad ones left out)" if found.bad else ""
    return (
        f"evaluated reward {found.before:.3f} -> {found.after:.3f} on {found.images} fixed images{bad}: "
        f"{found.gain:+.3f}, 95 % interval {found.low:+.3f} to {found.high:+.3f}: {VERDICTS[found.verdict]}"
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


def accuracy(records: Records, config: Config, there: Sequence[int]) -> tuple[float, float] | None:
    """Share of the fixed images before and after training that show exactly what their prompt says: as a held-out
    reward found it, else read off the pictures recorded. None unless all prompts are of the shapes world and the
    pictures are there as they were drawn."""
    sides = []
    for epoch in (there[0], there[-1]):
        seen = read_images(records.images(epoch)).held_out.get(ShapesAccuracy.name)
        share = mean_of_good(seen) if seen is not None else _read_off(records, config, epoch)
        if share is None or not np.isfinite(share):
            return None
        sides.append(share)
    return sides[0], sides[1]


def _read_off(records: Records, config: Config, epoch: int) -> float | None:
    if config.run.thumbnail_pixels < IMAGE_SIZE or _side(config) != IMAGE_SIZE:
        return None  # recorded smaller than they were drawn
    table = pq.read_table(io.BytesIO(records.images(epoch)), columns=["prompt", "thumbnail_png", "bad"]).to_pylist()
    right = []
    for row in table:
        if row["bad"] is not None or row["thumbnail_png"] is None:
            continue  # it is left out of the reward, too
        try:
            scene = parse(row["prompt"])
        except ValueError:
            return None  # prompts of another world
        picture = np.asarray(Image.open(io.BytesIO(row["thumbnail_png"])).convert("RGB"))
        if picture.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
            return None
        right.append(correct(picture, scene))
    return float(np.mean(right)) if right else None


def _side(config: Config) -> int:
    """Of the pictures that the base model draws, in pixels.

    Raises:
        OSError: the model is not in a local folder.
    """
    folder = resolve(str(config.model.path))
    unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def next_commands(records: Records, config: Config) -> list[str]:
    """What to type now, with this run's path."""
    run, python, images, prompt = shlex.quote(str(records.storage)), interpreter(), "", ""
    if not config.evaluation.images:
        chunk = config.sampler.chunk_size
        images = f" --images {-(-IMAGES // chunk) * chunk}"  # whole chunks
    if config.prompts.path is not None:
        there = records.evaluated()
        first = records.evaluation_prompt(there[-1]) if there else "what to draw"
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
