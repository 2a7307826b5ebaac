"""Score pictures from the command line: `python -m rewards.score --reward hpsv2 --prompts prompts.txt pictures/`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewards import registry

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OUTPUTS = (".csv", ".jsonl", ".parquet")
BATCH = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints path, tab, score, and on stderr their mean and spread, which objective.reward_offset and beta are chosen
    by. Returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m rewards.score", description=__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, or folders of them: PNG, JPEG, WebP")
    parser.add_argument("--reward", required=True, help=f"{', '.join(registry.NAMES)}, or your own as module:callable")
    parser.add_argument("--weights", help="path or hub id")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the reward; JSON or text"
    )
    parser.add_argument("--prompts", help="prompts in the sorted order of the images, or one: as prompts.path of a run")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--output", type=Path, help="also write image, prompt and score to this .csv, .jsonl or .parquet"
    )
    args = parser.parse_args(arguments)
    try:
        if args.output and args.output.suffix not in OUTPUTS:
            raise ValueError(f"--output: {args.output}, expected {', '.join(OUTPUTS)}")
        registry.check_name(args.reward)
        options = dict(_option(text) for text in args.option)
        registry.check_options(options)
        files = find_images(args.images)
        prompts = read_prompts(args.prompts, len(files))
        registry.check_device(args.device)  # the first that imports torch
        reward = registry.load(args.reward, args.weights, args.device, **options)
        scores = score(reward, files, prompts, args.device)
        if args.output:
            write(args.output, files, prompts, scores)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"rewards.score: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def find_images(names: Sequence[str]) -> list[Path]:
    """All pictures named, or in the folders named, sorted by path.

    Raises:
        ValueError: a path that does not exist, is no picture by its suffix, or a folder without any.
    """
    found: set[Path] = set()
    for name in names:
        path = Path(name)
        if not path.exists():
            raise ValueError(f"no such file or folder: {path}")
        inside = [path] if path.is_file() else list(path.iterdir())
        pictures = [file for file in inside if file.is_file() and file.suffix.lower() in SUFFIXES]
        if not pictures:
            raise ValueError(f"{path}: no {', '.join(SUFFIXES)}")
        found.update(pictures)
    return sorted(found)


def read_prompts(name: str | None, count: int) -> list[str]:
    """One for each image; all empty when there is no file.

    Raises:
        ValueError: neither one prompt nor `count`, or as a run's prompts.path.
    """
    if name is None:
        return [""] * count
    from learner import prompts

    lines = prompts.read_prompts(name, key="--prompts")
    if len(lines) not in (1, count):
        raise ValueError(f"--prompts: {name} has {len(lines)} prompts for {count} images, expected {count} or 1")
    return lines if len(lines) == count else lines * count


def score(reward: registry.Reward, files: Sequence[Path], prompts: Sequence[str], device: str) -> list[float]:
    """Prints each file's score as it is known, then their mean and spread.

    Raises:
        ValueError: a file that cannot be read, or that the reward raised on.
    """
    import numpy as np
    import torch

    scores: list[float] = []
    for part in batches(files):
        images = torch.from_numpy(np.stack([picture for _, picture in part])).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad(), registry.named_failure(ValueError, f"{reward.name} failed on {part[0][0]}", reward):
            values = reward(images.to(device), prompts[len(scores) : len(scores) + len(part)])
        for (file, _), value in zip(part, values.tolist(), strict=True):
            scores.append(value)
            print(f"{file}\t{value:.6g}", flush=True)
    print(
        f"{len(scores)} pictures: mean {np.mean(scores):.4g}, standard deviation {np.std(scores):.4g}, "
        f"from {np.min(scores):.4g} to {np.max(scores):.4g}",
        file=sys.stderr,
    )
    return scores


def batches(files: Sequence[Path]) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Runs of at most BATCH pictures [H, W, 3] of one size, in order.

    Raises:
        ValueError: a file that cannot be read.
    """
    import numpy as np
    from PIL import Image

    part: list[tuple[Path, np.ndarray]] = []
    for file in files:
        try:
            with Image.open(file) as opened:
                picture = np.asarray(opened.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{file}: {error}") from error
        if part and (len(part) == BATCH or part[-1][1].shape != picture.shape):
            yield part
            part = []
        part.append((file, picture))
    if part:
        yield part


def write(path: Path, files: Sequence[Path], prompts: Sequence[str], scores: Sequence[float]) -> None:
    """Columns image, prompt, score."""
    import pandas as pd  # type: ignore[import-untyped]

    table = pd.DataFrame({"image": [str(file) for file in files], "prompt": list(prompts), "score": list(scores)})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True, force_ascii=False, double_precision=15)


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(f"--option: {text!r}, expected key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
