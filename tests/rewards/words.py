"""Pictures of words, as the reward ocr is to read them: fonts, sizes, colours, places and grain at random."""

import random
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"
FACES = [
    f"DejaVu{face}.ttf"
    for face in ("Sans", "Sans-Bold", "Sans-Oblique", "Serif", "Serif-Bold", "SansMono", "SansMono-Bold")
]
INKS = (  # and their grounds
    ("black", "white"), ("white", "black"), ("firebrick", "cornsilk"), ("gold", "navy"), ("white", "firebrick"),
    ("darkgreen", "lavender"), ("saddlebrown", "antiquewhite"), ("whitesmoke", "darkgreen"),
)  # fmt: skip


def draw(text: str, pixels: int, rng: random.Random) -> np.ndarray:
    """[pixels, pixels, 3] uint8: a text of 45 to 90 % of the width, unless that were too high."""
    face, (ink, ground), share = str(FONTS / rng.choice(FACES)), rng.choice(INKS), rng.uniform(0.45, 0.9)
    for size in range(6, pixels):
        font = ImageFont.truetype(face, size)
        left, top, right, bottom = font.getbbox(text)
        if right - left > share * pixels or bottom - top > 0.35 * pixels:
            break
    picture = np.asarray(Image.new("RGB", (pixels, pixels), ground))
    if rng.random() < 0.4:
        grain = np.random.default_rng(rng.randrange(10**6)).normal(0, 12, picture.shape)
        picture = (picture + grain).clip(0, 255).astype(np.uint8)
    margin = max(2, pixels // 32)
    x = rng.uniform(margin, max(margin, pixels - (right - left) - margin)) - left
    y = rng.uniform(margin, pixels - (bottom - top) - margin) - top
    ImageDraw.Draw(image := Image.fromarray(picture)).text((x, y), text, ink, font)
    return np.asarray(image)


def page(*words: tuple[int, int, int, str], turned: float = 0.0) -> np.ndarray:
    """[512, 512, 3] uint8 of words (x, y of the baseline, size, text), black on white, turned left by degrees."""
    image = Image.new("RGB", (512, 512), "white")
    for x, y, size, text in words:
        font = ImageFont.truetype(str(FONTS / FACES[0]), size)
        ImageDraw.Draw(image).text((x, y), text, "black", font, anchor="ls")
    return np.asarray(image.rotate(turned, Image.Resampling.BICUBIC, fillcolor="white"))


def as_images(*pictures: np.ndarray) -> torch.Tensor:
    """[B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
