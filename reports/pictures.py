"""Sheets of pictures: of an evaluation, each above reward and prompt; of a base model and a LoRA, row by row."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from diffusion.trajectory import Scores

SHEET_COLUMNS = 8
SHEET_IMAGES = 32
GAP, LINE, CAPTION_LINES = 8, 12, 3  # pixels between pictures, pixels a caption line, lines
THIN = 2  # pixels between pictures of one caption
# Of a comparison: labels of its rows, pixels a picture is shown with, pixels around and for a label, size of the fonts.
LABELS = ("base", "tuned")
SMALLEST, LARGEST = 160, 512
MARGIN, SPACE, LABEL = 16, 6, 76
PROMPT_SIZE, LABEL_SIZE, LEGEND_SIZE = 17, 15, 13
INK, FAINT = "#1c1e21", "#6b7078"
SHORTEST = 12  # letters a line


def contact_sheet(scores: Sequence[Scores], limit: int = SHEET_IMAGES) -> Image.Image:
    """The first `limit` images in rows of eight, at least 128 pixels wide, reward and prompt beneath."""
    pictures = [[Image.fromarray(image)] for part in scores for image in part.images][:limit]  # type: ignore[union-attr]
    prompts = [prompt for part in scores for prompt in part.chunk.prompts][:limit]
    values = [float(value) for part in scores for value in part.rewards[:, -1]][:limit]
    captions = [f"{value:.2f}  {prompt}" for value, prompt in zip(values, prompts, strict=True)]
    return _sheet(pictures, captions, SHEET_COLUMNS)


def side_by_side(sets: Sequence[bytes], names: Sequence[str], limit: int = SHEET_IMAGES // 4) -> Image.Image:
    """Of Parquet files of evaluation images (records/run_folder.py), drawn of the same prompts and noise: the first
    `limit` of each side by side, prompt and rewards beneath."""
    columns = ["prompt", "reward", "thumbnail_png"]
    tables = [pq.read_table(io.BytesIO(content), columns=columns).slice(0, limit).to_pylist() for content in sets]
    groups, captions = [], []
    for row in zip(*tables, strict=True):
        if all(image["thumbnail_png"] for image in row):
            groups.append([Image.open(io.BytesIO(image["thumbnail_png"])) for image in row])
            rewards = "  ".join(f"{name} {_reward(image)}" for name, image in zip(names, row, strict=True))
            captions.append(f"{row[0]['prompt']}:  {rewards}")
    return _sheet(groups, captions, max(1, SHEET_COLUMNS // len(sets)))


def _reward(image: dict[str, Any]) -> str:
    return "bad" if image["reward"] is None else f"{image['reward']:.2f}"


def _sheet(groups: Sequence[Sequence[Image.Image]], captions: Sequence[str], columns: int) -> Image.Image:
    """Groups of pictures, each group side by side above its caption."""
    count = max((len(group) for group in groups), default=1)
    side = max(128, min(256, groups[0][0].height)) if groups else 128
    width, height = count * (side + THIN) - THIN + GAP, side + GAP + CAPTION_LINES * LINE
    sheet = Image.new("RGB", (columns * width, max(1, -(-len(groups) // columns)) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (group, text) in enumerate(zip(groups, captions, strict=True)):
        x, y = (i % columns) * width + GAP // 2, (i // columns) * height + GAP // 2
        for place, picture in enumerate(group):
            sheet.paste(_scaled(picture.convert("RGB"), side), (x + place * (side + THIN), y))
        lines = textwrap.wrap(text, count * side // 6, max_lines=CAPTION_LINES, placeholder=" ...")
        for line, words in enumerate(lines):
            pen.text((x, y + side + line * LINE), words, fill="black")
    return sheet


def tiles(sheet: Image.Image, count: int) -> list[Image.Image]:
    """The first `count` pictures of a contact sheet, as far as it has them."""
    side = sheet.width // SHEET_COLUMNS - GAP
    height = side + GAP + CAPTION_LINES * LINE
    places = [divmod(i, SHEET_COLUMNS) for i in range(min(count, SHEET_COLUMNS * (sheet.height // height)))]
    corners = [(column * (side + GAP) + GAP // 2, row * height + GAP // 2) for row, column in places]
    return [sheet.crop((x, y, x + side, y + side)) for x, y in corners]


def comparison(prompts: Sequence[str], pictures: Sequence[tuple[np.ndarray, ...]], legend: str = "") -> Image.Image:
    """For every prompt a row by each model, the same noise in a column. `pictures` has for each prompt those of each
    model, [n, H, W, 3] uint8, the base model's first. `legend` goes beneath, in small."""
    count, height = pictures[0][0].shape[:2]
    side = max(SMALLEST, min(LARGEST, height))
    wide = LABEL + count * (side + SPACE) - SPACE
    heads = [_wrapped(prompt, wide, PROMPT_SIZE, 3) for prompt in prompts]
    foot = _wrapped(legend, wide, LEGEND_SIZE, 4)
    tall = sum(len(head) * _height(PROMPT_SIZE) + SPACE + len(pictures[0]) * (side + SPACE) + MARGIN for head in heads)
    sheet = Image.new("RGB", (wide + 2 * MARGIN, tall + len(foot) * _height(LEGEND_SIZE) + 2 * MARGIN), "white")
    pen, y = ImageDraw.Draw(sheet), MARGIN

    def write(lines: Sequence[str], size: int, fill: str) -> None:
        nonlocal y
        for text in lines:
            pen.text((MARGIN, y), text, fill=fill, font=_font(size))
            y += _height(size)

    for head, rows in zip(heads, pictures, strict=True):
        write(head, PROMPT_SIZE, INK)
        y += SPACE if head else 0
        for label, row in zip(LABELS, rows, strict=False):
            pen.text((MARGIN, y + side // 2), label, fill=FAINT, font=_font(LABEL_SIZE), anchor="lm")
            for i, pixels in enumerate(row):
                sheet.paste(_scaled(Image.fromarray(pixels), side), (MARGIN + LABEL + i * (side + SPACE), y))
            y += side + SPACE
        y += MARGIN
    write(foot, LEGEND_SIZE, FAINT)
    return sheet


def _height(size: int) -> int:
    """Of a line of text, pixels."""
    return round(size * 1.35)


def _wrapped(text: str, width: int, size: int, lines: int) -> list[str]:
    """In lines of at most `width` pixels, as long as they can be."""
    wrapped: list[str] = []
    for letters in range(max(SHORTEST, int(4 * width / size)), SHORTEST - 1, -1):
        wrapped = textwrap.wrap(text, letters, max_lines=lines, placeholder=" ...")
        if all(_font(size).getlength(line) <= width for line in wrapped):
            break
    return wrapped


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own: the same on every machine, and with more than Latin letters."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.BICUBIC)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
