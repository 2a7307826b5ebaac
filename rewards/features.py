"""Feature vectors of pictures, by which diversity and drift are measured. Never rewards, never trained on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.names import FeatureKind
from rewards.network import short_side
from rewards.weights import WeightsNotFound, find

Features = Callable[[Tensor], Tensor]  # images [B, 3, H, W] in [0, 1] -> [B, F] float32
SIDE = 8  # of the grid of cells
OF_MEAN = 2.0  # weight of the mean colour beside the 64 cells


def pixels(images: Tensor) -> Tensor:
    """Colours of an 8 x 8 grid as they differ from the picture's mean colour, and that: F = 195. For plain pictures
    such as the embedded model's; on photographs it sees layout and colour alone."""
    cells = F.adaptive_avg_pool2d(images.float(), SIDE).flatten(2) * 2 - 1
    mean = cells.mean(2)
    return torch.cat([(cells - mean[..., None]).flatten(1), OF_MEAN * mean], 1)


def load(kind: FeatureKind, clip: str | None = None, device: str = "cpu") -> Features:
    """`clip`: OpenAI's CLIP, a folder or hub id as transformers saves it; its image embedding has length 1. dreamsim:
    that package's embedding (arXiv 2306.09344), tuned to people's judgement of similarity; never run in development.

    Raises WeightsNotFound, BadWeights.
    """
    if kind == "pixels":
        return pixels
    found = require(kind, clip, fetch=True)
    if kind == "dreamsim":
        from dreamsim import dreamsim

        model, _ = dreamsim(pretrained=True, device=device)  # it downloads its weights itself
    else:
        from rewards.aesthetic import clip_tower  # here: transformers takes a second

        model = clip_tower(found[0], device)

    def embed(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            if kind == "dreamsim":
                resized = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
                return model.embed(resized.to(device)).float()
            seen = short_side(images, model.config.image_size).to(device, torch.float32)
            return F.normalize(model(pixel_values=seen).image_embeds, dim=-1)

    return embed


def require(kind: FeatureKind, clip: str | None = None, fetch: bool = False) -> list[Any]:
    """The paths that `load` reads, as `weights.find`; raises WeightsNotFound where not all is there."""
    if kind == "dreamsim" and importlib.util.find_spec("dreamsim") is None:
        raise WeightsNotFound("evaluation.features: dreamsim: no such package here; pip install dreamsim")
    if kind != "clip":
        return []
    from rewards.aesthetic import CLIP, clip_asset

    return find([clip_asset("evaluation.clip", clip or CLIP)], fetch)
