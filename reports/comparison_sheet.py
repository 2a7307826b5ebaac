"""A sheet that shows pictures by one model, or by two beside each other: for every prompt a row of each, the same noise
in a column."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LABELS = ("base", "tuned")
SMALLEST, LARGEST = 160, 512  # pixels a picture is shown with
MARGIN, GAP, LABEL = 16, 6, 76  # pixels
PROMPT_SIZE, LABEL_SIZE, LEGEND_SIZE = 17, 15, 13
SHORTEST = 12  # letters a line
LEADING = 1.35  # line height over font size
INK, FAINT = "#1c1e21", "#6b7078"


def comparison(prompts: Sequence[str], pictures: Sequence[tuple[np.ndarray, ...]], legend: str = "") -> Image.Image:
    """`pictures` has for each prompt those of each model, [n, H, W, 3] uint8, the base model's first. `legend` goes
    beneath, in small."""
    count, height = pictures[0][0].shape[:2]
    rows = len(pictures[0])
    side = max(SMALLEST, min(LARGEST, height))
    wide = LABEL + count * (side + GAP) - GAP
    heads = [_wrapped(prompt, wide, PROMPT_SIZE, 3) for prompt in prompts]
    foot = _wrapped(legend, wide, LEGEND_SIZE, 4)
    line, small = round(PROMPT_SIZE * LEADING), round(LEGEND_SIZE * LEADING)
    blocks = [len(head) * line + GAP + rows * (side + GAP) + MARGIN for head in heads]
    sheet = Image.new("RGB", (wide + 2 * MARGIN, sum(blocks) + len(foot) * small + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    y = MARGIN
    for head, both in zip(heads, pictures, strict=True):
        for text in head:
            pen.text((MARGIN, y), text, fill=INK, font=_font(PROMPT_SIZE))
            y += line
        y += GAP if head else 0
        for label, row in zip(LABELS, both, strict=False):
            pen.text((MARGIN, y + side // 2), label, fill=FAINT, font=_font(LABEL_SIZE), anchor="lm")
            for i, pixels in enumerate(row):
                picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
                sheet.paste(picture, (MARGIN + LABEL + i * (side + GAP), y))
            y += side + GAP
        y += MARGIN
    for text in foot:
        pen.text((MARGIN, y), text, fill=FAINT, font=_font(LEGEND_SIZE))
        y += small
    return sheet


def _wrapped(text: str, width: int, size: int, lines: int) -> list[str]:
    """In lines of at most `width` pixels, as long as they can be."""
    found: list[str] = []
    for letters in range(max(SHORTEST, int(4 * width / size)), SHORTEST - 1, -1):
        found = textwrap.wrap(text, letters, max_lines=lines, placeholder=" ...")
        if all(_font(size).getlength(line) <= width for line in found):
            break
    return found


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's own: the same on every machine, and with more than Latin letters."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
