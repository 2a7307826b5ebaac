"""Contact sheets: pictures in rows, each above its reward and prompt."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import Any

import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from diffusion.trajectory import Scores

SHEET_COLUMNS = 8
SHEET_IMAGES = 32
GAP, LINE, CAPTION_LINES = 8, 12, 3  # pixels between pictures, pixels a caption line, lines
THIN = 2  # pixels between pictures of one caption


def contact_sheet(scores: Sequence[Scores], limit: int = SHEET_IMAGES) -> Image.Image:
    """The first `limit` images in rows of eight, at least 128 pixels wide, reward and prompt beneath."""
    pictures = [image for part in scores for image in part.images][:limit]  # type: ignore[union-attr]
    prompts = [prompt for part in scores for prompt in part.chunk.prompts][:limit]
    values = [float(value) for part in scores for value in part.rewards[:, -1]][:limit]
    shown = [[Image.fromarray(picture)] for picture in pictures]
    captions = [f"{value:.2f}  {prompt}" for value, prompt in zip(values, prompts, strict=True)]
    return _sheet(shown, captions, SHEET_COLUMNS)


def _sheet(groups: Sequence[Sequence[Image.Image]], captions: Sequence[str], columns: int) -> Image.Image:
    """Groups of pictures, each group side by side above its caption."""
    many = max((len(group) for group in groups), default=1)
    side = max(128, min(256, groups[0][0].height)) if groups else 128
    width, height = many * (side + THIN) - THIN + GAP, side + GAP + CAPTION_LINES * LINE
    sheet = Image.new("RGB", (columns * width, max(1, -(-len(groups) // columns)) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (group, text) in enumerate(zip(groups, captions, strict=True)):
        x, y = (i % columns) * width + GAP // 2, (i // columns) * height + GAP // 2
        for place, picture in enumerate(group):
            sheet.paste(
                picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), (x + place * (side + THIN), y)
            )
        caption = textwrap.wrap(text, many * side // 6, max_lines=CAPTION_LINES, placeholder=" ...")
        for line, words in enumerate(caption):
            pen.text((x, y + side + line * LINE), words, fill="black")
    return sheet


def tiles(sheet: Image.Image, count: int) -> list[Image.Image]:
    """The first `count` pictures of a contact sheet, as far as it has them."""
    side = sheet.width // SHEET_COLUMNS - GAP
    height = side + GAP + CAPTION_LINES * LINE
    count = min(count, SHEET_COLUMNS * (sheet.height // height))
    corners = [
        ((i % SHEET_COLUMNS) * (side + GAP) + GAP // 2, (i // SHEET_COLUMNS) * height + GAP // 2) for i in range(count)
    ]
    return [sheet.crop((x, y, x + side, y + side)) for x, y in corners]


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def side_by_side(sets: Sequence[bytes], names: Sequence[str], limit: int = SHEET_IMAGES // 4) -> Image.Image:
    """Of Parquet files of evaluation images (records/run_folder.py), drawn of the same prompts and noise: the first
    `limit` of each side by side, prompt and rewards beneath."""
    columns = ["prompt", "reward", "thumbnail_png"]
    rows = zip(
        *(pq.read_table(io.BytesIO(one), columns=columns).slice(0, limit).to_pylist() for one in sets), strict=True
    )
    shown = [row for row in rows if all(one["thumbnail_png"] for one in row)]
    captions = [
        f"{row[0]['prompt']}:  " + "  ".join(f"{name} {_value(one)}" for name, one in zip(names, row, strict=True))
        for row in shown
    ]
    groups = [[Image.open(io.BytesIO(one["thumbnail_png"])) for one in row] for row in shown]
    return _sheet(groups, captions, max(1, SHEET_COLUMNS // len(sets)))


def _value(row: dict[str, Any]) -> str:
    return "bad" if row["reward"] is None else f"{row['reward']:.2f}"
