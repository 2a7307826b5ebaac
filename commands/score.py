"""Score pictures from the command line: `python -m learner score --reward hpsv2 --prompts prompts.txt pictures/`."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commands.outcome import complain, require_writable
from rewards import registry
from rewards.contract import Reward, call
from rewards.own_code import named_failure

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
BATCH = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints path, tab, score, and on stderr their mean and spread, which objective.reward_offset and beta are chosen
    by. Returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m learner score", description=__doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="files, or folders of them: PNG, JPEG, WebP")
    add("--reward", required=True, help=f"{', '.join(registry.NAMES)}, or your own as module:callable")
    add("--weights", help="path or hub id")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="of the reward; JSON or text")
    add(
        "--prompts",
        help="file or set of prompts, as prompts.path of a run: in the images' sorted order, or one",
    )
    add("--device", default="cpu", help="cpu or cuda")
    add("--output", type=Path, metavar="FILE.csv", help="also write image, prompt and score")
    args = parser.parse_args(arguments)
    try:
        if args.output and args.output.suffix != ".csv":
            raise ValueError(f"--output: {args.output}, expected a .csv")
        require_writable("--output", args.output)
        registry.check_name(args.reward)
        options = dict(option(text) for text in args.option)
        registry.check_options(options)
        files = find_images(args.images)
        prompts = read_prompts(args.prompts, len(files))
        reward = registry.load(args.reward, args.weights, args.device, **options)  # the first that imports torch
        scores = score(reward, files, prompts, args.device)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with args.output.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("image", "prompt", "score"), *zip(files, prompts, scores, strict=True)])
    except BrokenPipeError:  # of what it prints
        raise
    except (ValueError, OSError, RuntimeError, AssertionError) as error:  # the last two: a device that is not here
        complain("score", str(error))
        return 2
    return 0


def find_images(names: Sequence[str]) -> list[Path]:
    """All pictures named, or in the folders named, sorted by path. Raises ValueError for a path without any."""
    images: set[Path] = set()
    for path in map(Path, names):
        if not path.exists():
            raise ValueError(f"no such file or folder: {path}")
        inside = [path] if path.is_file() else path.iterdir()
        pictures = {file for file in inside if file.is_file() and file.suffix.lower() in SUFFIXES}
        if not pictures:
            raise ValueError(f"{path}: no {', '.join(SUFFIXES)}")
        images |= pictures
    return sorted(images)


def read_prompts(name: str | None, count: int) -> list[str]:
    """One for each image; all empty when there is no file. Raises ValueError for neither one prompt nor `count`."""
    from learner import prompts

    lines = [""] if name is None else prompts.read_prompts(name, key="--prompts")
    if len(lines) not in (1, count):
        raise ValueError(f"--prompts: {name} has {len(lines)} prompts for {count} images, expected {count} or 1")
    return lines if len(lines) == count else lines * count


def score(reward: Reward, files: Sequence[Path], prompts: Sequence[str], device: str) -> list[float]:
    """Prints each file's score as it is known, then their mean and spread. At most BATCH pictures of one size at once.
    Raises ValueError for a file that cannot be read, or that the reward raised on."""
    import numpy as np
    import torch

    from learner.prompts import metadata_of

    scores: list[float] = []
    waiting = zip(files, map(_picture, files), prompts, strict=True)
    for _, same_size in itertools.groupby(waiting, lambda item: item[1].shape):
        while part := list(itertools.islice(same_size, BATCH)):
            names, pictures, texts = zip(*part, strict=True)
            images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
            with torch.no_grad(), named_failure(ValueError, f"{reward.name} failed on {names[0]}"):
                values = call(reward, images.to(device), list(map(str, texts)), metadata_of(texts))
            for file, value in zip(names, values.tolist(), strict=True):
                scores.append(value)
                print(f"{file}\t{value:.6g}", flush=True)
    mean, spread = f"mean {np.mean(scores):.4g}", f"standard deviation {np.std(scores):.4g}"
    print(f"{len(scores)} pictures: {mean}, {spread}, from {min(scores):.4g} to {max(scores):.4g}", file=sys.stderr)
    return scores


def _picture(file: Path) -> np.ndarray:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(file) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{file}: {error}") from error


def option(text: str) -> tuple[str, Any]:
    """Name and value of a reward's option. Raises ValueError."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(f"--option: {text!r}, expected key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
