"""JPEG size in kB at quality 95: plus (incompressibility) or minus (compressibility) that."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

QUALITY = 95


class JpegSize:
    """Score = sign * bytes / 1000 of each image saved as JPEG at quality 95. The prompt does not matter."""

    differentiable = False

    def __init__(self, sign: Literal[-1, 1] = 1) -> None:
        self.sign = sign
        self.name = "jpeg_incompressibility" if sign > 0 else "jpeg_compressibility"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([self.sign * self._kilobytes(image) for image in pixels], dtype=torch.float32)

    @staticmethod
    def _kilobytes(pixels) -> float:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY)
        return buffer.tell() / 1000
