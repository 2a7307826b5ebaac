"""The report's pictures: the same noise before and after training, and what the last epochs' best and worst look like.

Everything comes from the run's files; what is not there, or cannot be read, is left out of the page.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from records.run_folder import BEFORE, EVALUATION, TRAJECTORIES, Records
from records.storage import Storage
from reports.diagrams import data_url
from reports.pictures import SHEET_IMAGES, tiles

EPOCHS_READ = 40  # of a long run's trajectories, evenly chosen, for the distribution of rewards
LAST_EPOCHS, PROMPTS = 5, 6  # among whose trajectories the best and worst are looked for
SMALL = 12_000  # bytes of a PNG that goes into the page as it is
SIDE, QUALITY = 192, 88  # pixels at most, and JPEG quality, of all others


@dataclass(frozen=True)
class Picture:
    """`source` is a data URL; `reward` is None of a bad one."""

    label: str
    source: str
    reward: float | None


@dataclass(frozen=True)
class Pair:
    """One prompt and noise, `pictures` in the order of training; `gain` in reward, if there are two good ones."""

    pictures: list[Picture]
    gain: float | None


@dataclass(frozen=True)
class Prompt:
    """What there is to see of a prompt: pairs, or the best, median and worst of `count` trajectories."""

    text: str
    pairs: list[Pair]
    count: int = 0


@dataclass(frozen=True)
class Gallery:
    prompts: list[Prompt]
    pictures: int  # in all: pairs, or trajectories chosen from
    first: int = 0  # epochs done, of the trajectories chosen from
    last: int = 0


def pairs(records: Records, evaluated: Sequence[int]) -> Gallery | None:
    """The first images of the fixed evaluation set, before training and after the last evaluated epoch, by prompt.
    None without evaluations or sheets of them."""
    if not evaluated:
        return None
    epochs = [BEFORE, evaluated[-1]] if evaluated[0] == BEFORE and len(evaluated) > 1 else [evaluated[-1]]
    found = [(epoch, table) for epoch in epochs if (table := _sheet(records, epoch))]
    if not found:
        return None
    prompts = found[-1][1][0]
    found = [(epoch, table) for epoch, table in found if table[0] == prompts]  # else they are not pairs
    labels = {epoch: "before" if epoch == BEFORE else f"after epoch {epoch + 1}" for epoch, _ in found}
    groups: dict[str, list[Pair]] = {}
    for i, prompt in enumerate(prompts):
        shown = [
            Picture(labels[epoch], table[2][i], table[1][i]) for epoch, table in found if i < len(table[2])
        ]  # fmt: skip
        rewards = [one.reward for one in shown if one.reward is not None]
        groups.setdefault(prompt, []).append(Pair(shown, rewards[1] - rewards[0] if len(rewards) == 2 else None))
    return Gallery([Prompt(text, some) for text, some in groups.items()], sum(map(len, groups.values())))


def rewards(storage: Storage) -> list[tuple[int, np.ndarray]]:
    """(epochs done, rewards [n] of its good trajectories) of at most EPOCHS_READ epochs, in order, from that column
    alone (of files on this machine; an object store's are fetched whole)."""
    epochs = trajectory_epochs(storage)
    places = np.linspace(0, len(epochs) - 1, min(len(epochs), EPOCHS_READ)).round().astype(int)
    tables = ((epochs[i] + 1, _table(storage, epochs[i], ["reward"])) for i in places)
    found = (
        (epoch, table["reward"].drop_null().to_numpy().astype(np.float64))
        for epoch, table in tables
        if table is not None
    )
    return [(epoch, values[np.isfinite(values)]) for epoch, values in found]


def extremes(storage: Storage) -> Gallery | None:
    """Best, median and worst trajectory of each of the PROMPTS prompts with most trajectories in the last epochs.
    None without thumbnails."""
    rows: list[dict[str, Any]] = []
    for epoch in trajectory_epochs(storage)[-LAST_EPOCHS:]:
        table = _table(storage, epoch, ["prompt", "reward"])
        if table is not None:
            rows += [{**row, "epoch": epoch, "place": i} for i, row in enumerate(table.to_pylist())]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["reward"] is not None and np.isfinite(row["reward"]):
            groups.setdefault(row["prompt"], []).append(row)
    most = sorted(groups, key=lambda prompt: -len(groups[prompt]))[:PROMPTS]  # of equal ones those met first
    chosen = {prompt: _chosen(groups[prompt]) for prompt in most}
    thumbnails: dict[tuple[int, int], str] = {}
    for epoch in sorted({row["epoch"] for some in chosen.values() for _, row in some}):
        places = [row["place"] for some in chosen.values() for _, row in some if row["epoch"] == epoch]
        table = _table(storage, epoch, ["thumbnail_png"])
        column = table["thumbnail_png"].take(places).to_pylist() if table is not None else []
        for place, content in zip(places, column, strict=False):
            if content and (source := _source(content)):
                thumbnails[epoch, place] = source
    prompts = []
    for prompt, some in chosen.items():
        shown = [
            Picture(label, thumbnails[row["epoch"], row["place"]], row["reward"])
            for label, row in some
            if (row["epoch"], row["place"]) in thumbnails
        ]
        if shown:
            prompts.append(Prompt(prompt, [Pair(shown, None)], len(groups[prompt])))
    if not prompts:
        return None
    epochs = [row["epoch"] + 1 for row in rows]
    return Gallery(prompts, sum(one.count for one in prompts), min(epochs), max(epochs))


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
    name = "epoch-before" if epoch == BEFORE else f"epoch-{epoch:06d}"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        table = json.loads(records.storage.read(f"{EVALUATION}/{name}.json"))
        prompts, values = table["prompt"][:SHEET_IMAGES], table["reward"][:SHEET_IMAGES]
        with Image.open(io.BytesIO(records.sheet(epoch))) as sheet:
            cut = tiles(sheet.convert("RGB"), len(prompts))
        return prompts[: len(cut)], values[: len(cut)], [_jpeg(tile) for tile in cut]
    return None


def _table(storage: Storage, epoch: int, columns: list[str]) -> pa.Table | None:
    """Some columns of an epoch's trajectories; None where the file cannot be read or has no such column."""
    name = f"{TRAJECTORIES}/epoch-{epoch:06d}.parquet"
    with contextlib.suppress(OSError, ValueError):  # pyarrow's errors are of these kinds
        if not storage.exists(name):  # refuses links that lead out of the run
            return None
        source: Path | io.BytesIO = storage.local / name if storage.local else io.BytesIO(storage.read(name))
        with pq.ParquetFile(source) as file:
            table = file.read(columns=columns)
        return table if set(columns) <= set(table.column_names) else None
    return None


def _source(content: bytes) -> str | None:
    """Data URL of a PNG file, made smaller where it is large; None where it is no picture."""
    with contextlib.suppress(OSError, ValueError), Image.open(io.BytesIO(content)) as picture:
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
