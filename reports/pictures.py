"""Sheets of pictures: of an evaluation, each above reward and prompt; of a base model and a LoRA, row by row."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from diffusion.trajectory import Scores
from records.words import short

SHEET_COLUMNS, SHEET_IMAGES = 8, 32
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
    pictures = [[Image.fromarray(image)] for part in scores for image in part.images]  # type: ignore[union-attr]
    prompts = [prompt for part in scores for prompt in part.chunk.prompts]
    values = [float(value) for part in scores for value in part.rewards[:, -1]]
    captions = [f"{value:.2f}  {prompt}" for value, prompt in zip(values, prompts, strict=True)]
    return _sheet(pictures[:limit], captions[:limit], SHEET_COLUMNS)


def side_by_side(sets: Sequence[bytes], names: Sequence[str], limit: int = SHEET_IMAGES // 4) -> Image.Image:
    """Of Parquet files of evaluation images (records/run_folder.py), drawn of the same prompts and noise: the first
    `limit` of each side by side, prompt and rewards beneath."""
    columns = ["prompt", "reward", "thumbnail_png"]
    tables = [pq.read_table(io.BytesIO(content), columns=columns).slice(0, limit).to_pylist() for content in sets]
    groups, captions = [], []
    for row in zip(*tables, strict=True):
        if all(image["thumbnail_png"] for image in row):
            groups.append([Image.open(io.BytesIO(image["thumbnail_png"])) for image in row])
            rewards = ["bad" if image["reward"] is None else f"{image['reward']:.2f}" for image in row]
            words = "  ".join(f"{name} {reward}" for name, reward in zip(names, rewards, strict=True))
            captions.append(f"{row[0]['prompt']}:  {words}")
    return _sheet(groups, captions, max(1, SHEET_COLUMNS // len(sets)))


def _sheet(groups: Sequence[Sequence[Image.Image]], captions: Sequence[str], columns: int) -> Image.Image:
    """Groups of pictures, each group side by side above its caption."""
    count = max((len(group) for group in groups), default=1)
    side = max(128, min(256, groups[0][0].height)) if groups else 128
    width, height = count * (side + THIN) - THIN + GAP, side + GAP + CAPTION_LINES * LINE
    sheet = Image.new("RGB", (columns * width, max(1, -(-len(groups) // columns)) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (group, text) in enumerate(zip(groups, map(short, captions), strict=True)):
        x, y = (i % columns) * width + GAP // 2, (i // columns) * height + GAP // 2
        for place, picture in enumerate(group):
            sheet.paste(picture.convert("RGB").resize((side, side)), (x + place * (side + THIN), y))
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
    width, strips = LABEL + count * (side + SPACE) - SPACE, []
    for prompt, rows in zip(prompts, pictures, strict=True):
        strips.append(_text(prompt, width, PROMPT_SIZE, INK, 3))
        for label, row in zip(LABELS, rows, strict=False):
            strip = Image.new("RGB", (width, side + SPACE), "white")
            ImageDraw.Draw(strip).text((0, side // 2), label, FAINT, _font(LABEL_SIZE), anchor="lm")
            for i, pixels in enumerate(row):
                strip.paste(Image.fromarray(pixels).resize((side, side)), (LABEL + i * (side + SPACE), 0))
            strips.append(strip)
    strips.append(_text(legend, width, LEGEND_SIZE, FAINT, 4))
    pixels = np.concatenate([np.asarray(strip) for strip in strips])
    return Image.fromarray(np.pad(pixels, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255))


def _text(text: str, width: int, size: int, colour: str, lines: int) -> Image.Image:
    """A strip of at most that many lines, as long as `width` pixels allow, with a space beneath."""
    text, font, height, wrapped = short(text), _font(size), round(size * 1.35), list[str]()
    for letters in range(max(SHORTEST, int(4 * width / size)), SHORTEST - 1, -1):
        wrapped = textwrap.wrap(text, letters, max_lines=lines, placeholder=" ...")
        if all(font.getlength(line) <= width for line in wrapped):
            break
    strip = Image.new("RGB", (width, len(wrapped) * height + SPACE), "white")
    for i, line in enumerate(wrapped):
        ImageDraw.Draw(strip).text((0, i * height), line, colour, font)
    return strip


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own: the same on every machine, and with more than Latin letters."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
