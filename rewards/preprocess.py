"""How reward models see pictures: resized, cropped or padded, normalised. One resize for reports, one for gradients.

CLIP's and BLIP's authors resize 8-bit pictures with PIL. Autograd does not reach through that; torch's antialiased
bicubic resize has the same kernel, but does not round to 8 bits in between (up to 4.5e-3 of an ImageReward).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, RGB
STD = (0.26862954, 0.26130258, 0.27577711)


def short_side(images: Tensor, side: int) -> Tensor:
    """The short side to `side`, the centre cut out, normalised: CLIP, BLIP.

    images [B, 3, H, W] in [0, 1] -> [B, 3, side, side]. By PIL, as its authors do, unless the images need a gradient.
    """
    images = _at_least_float32(images)
    height, width = images.shape[-2:]
    short, long = min(height, width), max(height, width)
    longer = int(side * long / short)
    size = (longer, side) if height > width else (side, longer)
    if images.requires_grad and torch.is_grad_enabled():
        resized = _resize(images, size)
    else:
        resized = _resize_as_pictures(images, size)
    top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return normalise(resized[..., top : top + side, left : left + side])


def long_side(images: Tensor, side: int) -> Tensor:
    """The long side to `side`, padded with black to a square, normalised: HPSv2, which resizes tensors itself.

    images [B, 3, H, W] in [0, 1] -> [B, 3, side, side].
    """
    images = _at_least_float32(images)
    scale = side / max(images.shape[-2:])
    height, width = (round(length * scale) for length in images.shape[-2:])
    resized = _resize(images, (height, width))
    down, right = side - height, side - width
    return normalise(F.pad(resized, (right // 2, right - right // 2, down // 2, down - down // 2)))


def normalise(images: Tensor) -> Tensor:
    mean, std = images.new_tensor(MEAN)[:, None, None], images.new_tensor(STD)[:, None, None]
    return (images - mean) / std


def _at_least_float32(images: Tensor) -> Tensor:
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)


def _resize_as_pictures(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Through 8-bit pictures; float32."""
    pixels = images.detach().clamp(0, 1).mul(255).round().to(torch.uint8)
    if tuple(images.shape[-2:]) != size:
        pictures = [
            np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))
            for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()
        ]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(images.device)
    return pixels.float() / 255
