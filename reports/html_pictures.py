"""The report's pictures: the same noise before and after training, and what the last epochs' best and worst look like.

Everything comes from the run's files; what is not there, or cannot be read, is left out of the page.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from records.run_folder import BEFORE, TRAJECTORIES, Records
from records.storage import Storage
from reports.diagrams import data_url
from reports.facts import fixed_images
from reports.pictures import SHEET_IMAGES, tiles

EPOCHS_READ = 40  # of a long run's trajectories, evenly chosen, for the distribution of rewards
LAST_EPOCHS, PROMPTS = 5, 6  # among whose trajectories the best and worst are looked for
SMALL = 12_000  # bytes of a PNG that goes into the page as it is
SIDE, QUALITY = 192, 88  # pixels at most, and JPEG quality, of all others
UNREADABLE = (OSError, ValueError, LookupError, TypeError, pa.ArrowException, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """`source` is a data URL; `reward` is None of a bad one."""

    label: str
    source: str
    reward: float | None


@dataclass(frozen=True)
class Prompt:
    """What there is to see of a prompt, row by row: the same noise before and after training, or the best, median and
    worst of `count` trajectories."""

    text: str
    rows: list[list[Picture]]
    count: int = 0


def pairs(records: Records, evaluated: Sequence[int]) -> list[Prompt]:
    """The first images of the fixed evaluation set, before training and after the last evaluated epoch, by prompt.
    Empty without evaluations or sheets of them."""
    ends = [epoch for epoch in evaluated if epoch in (BEFORE, evaluated[-1])]
    sheets = [(epoch, sheet) for epoch in ends if (sheet := _sheet(records, epoch))]
    groups: dict[str, list[list[Picture]]] = {}
    for i, prompt in enumerate(sheets[-1][1][0] if sheets else ()):
        row = [
            Picture("before" if epoch == BEFORE else f"after epoch {epoch + 1}", sources[i], rewards[i])
            for epoch, (prompts, rewards, sources) in sheets
            if prompts == sheets[-1][1][0]  # else they are not pairs
        ]
        groups.setdefault(prompt, []).append(row)
    return [Prompt(text, rows) for text, rows in groups.items()]


def rewards(storage: Storage) -> list[tuple[int, np.ndarray]]:
    """(epochs done, rewards [n] of its good trajectories) of at most EPOCHS_READ epochs, in order."""
    epochs = trajectory_epochs(storage)
    chosen = np.linspace(0, len(epochs) - 1, min(len(epochs), EPOCHS_READ)).round().astype(int)
    rows = {epochs[i] + 1: _rows(storage, epochs[i], ["reward"]) for i in chosen}
    return [(epoch, np.array([row["reward"] for row in some])) for epoch, some in rows.items() if some]


def extremes(storage: Storage) -> tuple[list[Prompt], int, int]:
    """Best, median and worst trajectory of each of the PROMPTS prompts with most trajectories in the last epochs, and
    the first and last of these epochs. Empty without thumbnails."""
    groups: dict[str, list[dict[str, Any]]] = {}
    epochs = []
    for epoch in trajectory_epochs(storage)[-LAST_EPOCHS:]:
        for row in _rows(storage, epoch, ["prompt", "reward", "thumbnail_png"]):
            groups.setdefault(row["prompt"], []).append(row)
            epochs.append(epoch + 1)
    prompts = []
    for text in sorted(groups, key=lambda prompt: -len(groups[prompt]))[:PROMPTS]:  # of equal ones those met first
        shown = [
            Picture(label, source, row["reward"])
            for label, row in _chosen(groups[text])
            if row["thumbnail_png"] and (source := _source(row["thumbnail_png"]))
        ]
        if shown:
            prompts.append(Prompt(text, [shown], len(groups[text])))
    return prompts, min(epochs, default=0), max(epochs, default=0)


def trajectory_epochs(storage: Storage) -> list[int]:
    """Epochs whose trajectories are here, in order."""
    numbers = (name.removeprefix("epoch-").removesuffix(".parquet") for name in storage.entries(TRAJECTORIES))
    return sorted(int(number) for number in numbers if number.isdigit())


def _chosen(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Best, median (the lower one of two) and worst of a prompt's trajectories; of two or one what there is."""
    ordered = sorted(rows, key=lambda row: row["reward"])
    if len(ordered) == 1:
        return [("the only one", ordered[0])]
    median = [("median", ordered[(len(ordered) - 1) // 2])] if len(ordered) > 2 else []
    return [("best", ordered[-1]), *median, ("worst", ordered[0])]


def _sheet(records: Records, epoch: int) -> tuple[list[str], list[float | None], list[str]] | None:
    """Prompts, rewards and data URLs of the images on an evaluation's contact sheet; None where it cannot be read."""
    with contextlib.suppress(*UNREADABLE):
        columns = fixed_images(records, epoch)
        prompts, rewards = columns["prompt"][:SHEET_IMAGES], columns["reward"][:SHEET_IMAGES]
        with Image.open(io.BytesIO(records.sheet(epoch))) as sheet:
            cut = tiles(sheet.convert("RGB"), len(prompts))
        return prompts[: len(cut)], rewards[: len(cut)], [_jpeg(tile) for tile in cut]
    return None


def _rows(storage: Storage, epoch: int, columns: list[str]) -> list[dict[str, Any]]:
    """Some columns, the reward among them, of an epoch's good trajectories, a row each; none where they cannot be read
    or there is no such column."""
    name = f"{TRAJECTORIES}/epoch-{epoch:06d}.parquet"
    with contextlib.suppress(*UNREADABLE):
        if storage.exists(name):  # refuses links that lead out of the run
            source: Path | io.BytesIO = storage.local / name if storage.local else io.BytesIO(storage.read(name))
            with pq.ParquetFile(source) as file:
                table = file.read(columns=columns)
            return table.select(columns).filter(pc.is_finite(table["reward"])).to_pylist()
    return []


def _source(content: bytes) -> str | None:
    """Data URL of a PNG file, made smaller where it is large; None where it is no picture."""
    with contextlib.suppress(*UNREADABLE), Image.open(io.BytesIO(content)) as picture:
        if len(content) <= SMALL and picture.format == "PNG":
            return data_url("image/png", content)
        return _jpeg(picture.convert("RGB"))
    return None


def _jpeg(picture: Image.Image) -> str:
    """Data URL of a picture, no larger than SIDE pixels: lossy, to look at."""
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, subsampling=0, optimize=True)
    return data_url("image/jpeg", file.getvalue())
