"""Judges adapters against the exact target p_ref exp(beta r): `python -m learner.targets RUN_OR_LORA... [key=value]`.

The target's laws are those of base pictures weighted by exp(beta r), beta being the run's true exponent, or --beta.
What is written, RUN/evaluation/targets-step-NNNNNN-N-images-KEY.json and .png (of a LoRA: into --out), is in
docs/evaluation.md. Pictures are those of learner.evaluate, and kept as there.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from commands import evaluate
from commands.outcome import complain
from evaluation import image_sets, targets
from evaluation.adapters import Target
from evaluation.image_sets import Cache
from learner.config import ConfigError
from records.run_folder import IMAGES, read_parquet
from records.storage import StorageError
from reports.targets import PREFIX, chart, table
from rewards.attributes import Values

SHOWN = 12  # pictures in each row of the chart
IMAGES_DRAWN = 2048  # and twice as many by the base model


@dataclass(frozen=True)
class Asked:
    """The command's own options; the exponent is the run's own where none is given."""

    beta: float | None
    attributes: dict[str, Values]  # to be read by CLIP; none: those of the shapes world
    given: str | None


@dataclass(frozen=True)
class Judged:
    target: Target
    figures: dict[str, Any]


def require(asked: Asked, found: Sequence[Target]) -> None:
    """Raises a ConfigError where there is nothing to judge a target against, or nothing to read off."""
    from rewards import attributes

    for target in found:
        if asked.beta is None and target.exponent is None:
            raise ConfigError(
                f"{target.name}: {target.no_exponent}; --beta B judges it against p_ref x exp(B x reward)"
            )
        prompts = target.prompts[: target.config.evaluation.images]
        if len(set(prompts)) * 2 > max(len(prompts), target.config.evaluation.images):
            fault = f"--images: {target.config.evaluation.images} pictures of {len(set(prompts))} prompts"
            raise ConfigError(f"{target.name}: {fault}; a law is within a prompt: give more, or fewer with --prompts")
        if asked.attributes:
            attributes.require_clip(target.config.evaluation.clip)
        elif not attributes.names_shapes(prompts):
            raise ConfigError(
                f"{target.name}: say what is to be read off its pictures: --attribute 'animal=a cat,a dog'"
            )


def judge(asked: Asked, found: Sequence[Target], cache: Cache) -> list[Judged]:
    return evaluate.draw(found, cache, functools.partial(_judge, asked))


def _judge(asked: Asked, target: Target, sets: dict[str, bytes]) -> tuple[Judged, str]:
    reader = _reader(asked, target)
    values: dict[str, Values] = {}

    shown: dict[str, dict[int, np.ndarray]] = {}  # by set and place

    def sample(name: str) -> tuple[list[str], targets.Sample]:
        seen = image_sets.read_images(sets[name])
        pictures, good = _pictures(sets[name], name)
        shown[name] = dict(zip(np.flatnonzero(good).tolist(), pictures, strict=True))
        readings = reader(pictures, [prompt for prompt, kept in zip(seen.prompts, good, strict=True) if kept])
        codes = {}
        for attribute, (known, numbers) in readings.items():
            values[attribute], codes[attribute] = known, np.zeros(len(good), np.int64)
            codes[attribute][good] = numbers
        return list(seen.prompts), targets.Sample(np.where(good, seen.rewards, np.nan), seen.features, codes)

    (prompts, tuned), *base = (sample(name) for name in ("tuned", "base", "other"))
    exponent = target.exponent if asked.beta is None else asked.beta
    assert exponent is not None  # `require` has seen to it
    try:
        estimated = targets.Target(exponent, prompts, tuned, [part for _, part in base])
    except ValueError as error:
        raise StorageError(f"{target.name}: {error}") from error
    figures = evaluate.facts(target) | {"own_beta": target.exponent}
    figures |= targets.judge(estimated, values, asked.given)
    place = _place(asked, target)
    first = estimated.kept[:SHOWN].tolist()
    rows = {name: [shown[by][i] for i in first] for name, by in (("base", "base"), ("tuned", "tuned"))}
    rows["target"] = [shown[("base", "other")[of]][i] for of, i in estimated.drawn(len(first))]
    target.out.write(f"{place}.png", chart(figures, rows))
    target.out.write_json(f"{place}.json", figures)
    if figures["warning"]:
        complain("targets", f"warning: {target.name}: {figures['warning']}")
    return Judged(target, figures), table(figures)


def _place(asked: Asked, target: Target) -> str:
    """Of the files, without a suffix: judgements of other targets have other ones."""
    file = PurePosixPath(target.file)
    exponent = target.exponent if asked.beta is None else asked.beta
    told = json.dumps([file.name, exponent, asked.attributes, asked.given])
    whole = f"{PREFIX}{file.name.rpartition('-')[0]}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    return str(file.with_name(whole))


def _reader(asked: Asked, target: Target) -> Callable[[Sequence[np.ndarray], Sequence[str]], Any]:
    from rewards import attributes

    if not asked.attributes:
        return attributes.of_shapes
    read = attributes.by_clip(asked.attributes, target.config.evaluation.clip)
    return lambda pictures, prompts: read(pictures)


def _pictures(content: bytes, place: str) -> tuple[list[np.ndarray], np.ndarray]:
    """Pictures of a set as it keeps them, and [n] bool: of which rows they are; bad ones have none."""
    files = read_parquet(content, place, IMAGES, ("thumbnail_png", "reward")).to_pylist()
    good = np.array([row["thumbnail_png"] is not None and row["reward"] is not None for row in files])
    kept = [row["thumbnail_png"] for row, kept in zip(files, good, strict=True) if kept]
    return [np.asarray(Image.open(io.BytesIO(file), formats=["PNG"]).convert("RGB")) for file in kept], good


def main(arguments: list[str] | None = None) -> int:
    parser = evaluate.parser("targets", __doc__.splitlines()[0].partition(": `")[0] + ".")
    add = parser.add_argument
    add("--beta", type=float, help="judge against p_ref x exp(BETA x reward), whatever the run aimed at")
    read = "read off by CLIP (evaluation.clip): the nearest text; may be given again (default: the shapes world's)"
    add("--attribute", action="append", default=[], metavar="NAME=VALUE,VALUE,...", help=read)
    add("--given", metavar="NAME", help="attribute given which the others' drift is judged (default: the most moved)")
    args = parser.parse_intermixed_args(arguments)
    args.images = IMAGES_DRAWN if args.images is None else args.images
    asked = Asked(args.beta, {}, args.given)

    def look(found: Sequence[Target]) -> None:
        from rewards import attributes

        if args.beta is not None and not (math.isfinite(args.beta) and args.beta > 0):
            raise ConfigError(f"--beta: {args.beta:g}: expected a number above 0")
        try:
            asked.attributes.update(attributes.named(text) for text in args.attribute)
        except ValueError as error:
            raise ConfigError(f"--attribute: {error}") from error
        names = asked.attributes or dict.fromkeys(attributes.SHAPES)
        if args.given is not None and args.given not in names:
            raise ConfigError(f"--given: no attribute {args.given!r}; there are {', '.join(names)}")
        require(asked, found)

    def show(judged: list[Judged]) -> None:
        evaluate.show([result.target for result in judged])

    return evaluate.run("targets", args, show, look, functools.partial(judge, asked))
