"""Score pictures from the command line: `python -m rewards.score --reward hpsv2 --prompts prompts.txt pictures/`."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rewards import registry

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
    parser.add_argument("--prompts", help="a file with a prompt a line in the sorted order of the images, or with one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--output", type=Path, help="also write image, prompt and score to this .csv, .jsonl or .parquet"
    )
    given = parser.parse_args(arguments)
    try:
        if given.output and given.output.suffix not in OUTPUTS:
            raise ValueError(f"--output: {given.output}, expected {', '.join(OUTPUTS)}")
        files = find_images(given.images)
        prompts = read_prompts(given.prompts, len(files))
        options = dict(_option(text) for text in given.option)
        registry.check_options(options)
        registry.check_device(given.device)
        reward = registry.load(given.reward, given.weights, given.device, **options)
        scores: list[float] = []
        for part in batches(files):
            images = torch.from_numpy(np.stack([picture for _, picture in part])).permute(0, 3, 1, 2).float() / 255
            some = prompts[len(scores) : len(scores) + len(part)]
            try:
                with torch.no_grad():
                    found = reward(images.to(given.device), some)
            except Exception as error:  # a user's code may raise anything
                raise ValueError(f"{given.reward} failed on {part[0][0]}: {type(error).__name__}: {error}") from error
            for (file, _), score in zip(part, found.tolist(), strict=True):
                scores.append(score)
                print(f"{file}\t{score:.6g}", flush=True)
        print(
            f"{len(scores)} pictures: mean {np.mean(scores):.4g}, standard deviation {np.std(scores):.4g}, "
            f"from {np.min(scores):.4g} to {np.max(scores):.4g}",
            file=sys.stderr,
        )
        if given.output:
            write(given.output, [str(file) for file in files], prompts, scores)
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
    """One for each image; all empty when there is no file. Lines that start with # are skipped, as learner.run does.

    Raises:
        ValueError: neither one line nor `count`.
    """
    if name is None:
        return [""] * count
    lines = [line.strip() for line in Path(name).read_text(encoding="utf-8-sig").split("\n")]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(lines) not in (1, count):
        raise ValueError(f"--prompts: {name} has {len(lines)} prompts for {count} images, expected {count} or 1")
    return lines if len(lines) == count else lines * count


def batches(files: Sequence[Path]) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Runs of at most BATCH pictures [H, W, 3] of one size, in order.

    Raises:
        ValueError: a file that cannot be read.
    """
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


def write(path: Path, files: list[str], prompts: list[str], scores: list[float]) -> None:
    """Columns image, prompt, score."""
    rows: list[dict[str, Any]] = [
        {"image": file, "prompt": prompt, "score": score}
        for file, prompt, score in zip(files, prompts, scores, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, ["image", "prompt", "score"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(f"--option: {text!r}, expected key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


if __name__ == "__main__":
    sys.exit(main())
