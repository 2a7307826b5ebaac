"""Contact sheets: pictures in rows, each above its reward and prompt."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

from diffusion.trajectory import Scores

SHEET_COLUMNS = 8
SHEET_IMAGES = 32
GAP, LINE, CAPTION_LINES = 8, 12, 3  # pixels between pictures, pixels a caption line, lines


def contact_sheet(scores: Sequence[Scores], limit: int = SHEET_IMAGES) -> Image.Image:
    """The first `limit` images in rows of eight, at least 128 pixels wide, reward and prompt beneath."""
    pictures = [image for part in scores for image in part.images][:limit]  # type: ignore[union-attr]
    prompts = [prompt for part in scores for prompt in part.chunk.prompts][:limit]
    values = [float(value) for part in scores for value in part.rewards[:, -1]][:limit]
    side = max(128, min(256, pictures[0].shape[0]))
    width, height = side + GAP, side + GAP + CAPTION_LINES * LINE
    rows = -(-len(pictures) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, prompt, value) in enumerate(zip(pictures, prompts, values, strict=True)):
        x, y = (i % SHEET_COLUMNS) * width + GAP // 2, (i // SHEET_COLUMNS) * height + GAP // 2
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC), (x, y))
        caption = textwrap.wrap(f"{value:.2f}  {prompt}", side // 6, max_lines=CAPTION_LINES, placeholder=" ...")
        for line, text in enumerate(caption):
            pen.text((x, y + side + line * LINE), text, fill="black")
    return sheet


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
