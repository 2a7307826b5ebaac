"""JPEG size in kB (1000 bytes) at quality 95: plus (incompressibility) or minus that. Prompts do not matter."""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor


class JpegIncompressibility:
    name, sign, differentiable = "jpeg_incompressibility", 1, False

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        sizes = []
        for picture in pixels:
            Image.fromarray(picture).save(file := io.BytesIO(), "JPEG", quality=95)
            sizes.append(self.sign * file.tell() / 1000)
        return torch.tensor(sizes, dtype=torch.float32)


class JpegCompressibility(JpegIncompressibility):
    name, sign = "jpeg_compressibility", -1
