"""Feature vectors of pictures, by which diversity and drift are measured. Never rewards, never trained on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.aesthetic import CLIP, clip_asset, clip_tower
from rewards.names import FeatureKind
from rewards.network import short_side
from rewards.weights import WeightsNotFound, find

CLIP_KEY = "evaluation.clip"


Features = Callable[[Tensor], Tensor]  # images [B, 3, H, W] in [0, 1] -> [B, F] float32
SIDE = 8  # of the grid of cells
OF_MEAN = 2.0  # weight of the mean colour beside the 64 cells


def pixels(images: Tensor) -> Tensor:
    """Colours of an 8 x 8 grid as they differ from the picture's mean colour, and that: F = 195. For plain pictures
    such as the embedded model's; on photographs it sees layout and colour alone."""
    cells = F.adaptive_avg_pool2d(images.float(), SIDE).flatten(2) * 2 - 1
    mean = cells.mean(2)
    return torch.cat([(cells - mean[..., None]).flatten(1), OF_MEAN * mean], 1)


def clip_embedding(source: str, device: str) -> Features:
    """Image embedding of OpenAI's CLIP, of length 1. `source`: folder or hub id, as transformers saves it."""
    [folder] = find([clip_asset(CLIP_KEY, source)])
    tower = clip_tower(folder, device)

    def embed(images: Tensor) -> Tensor:
        seen = short_side(images, tower.config.image_size).to(device, torch.float32)
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            return F.normalize(tower(pixel_values=seen).image_embeds, dim=-1)

    return embed


def dreamsim_embedding(device: str) -> Features:
    """DreamSim's embedding (arXiv 2306.09344), tuned to people's judgement of similarity, of the package `dreamsim`,
    which downloads its weights itself; never run in development."""
    from dreamsim import dreamsim

    model, _ = dreamsim(pretrained=True, device=device)

    def embed(images: Tensor) -> Tensor:
        resized = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
        with torch.no_grad():
            return model.embed(resized.to(device)).float()

    return embed


def load(kind: FeatureKind, clip: str | None = None, device: str = "cpu") -> Features:
    """
    Raises:
        WeightsNotFound, BadWeights: see there.
    """
    if kind == "pixels":
        return pixels
    require(kind, clip)
    return clip_embedding(clip or CLIP, device) if kind == "clip" else dreamsim_embedding(device)


def require(kind: FeatureKind, clip: str | None = None) -> None:
    """Is all there that `load` reads? Nothing is downloaded.

    Raises:
        WeightsNotFound: it is not.
    """
    if kind == "dreamsim" and importlib.util.find_spec("dreamsim") is None:
        raise WeightsNotFound("evaluation.features: dreamsim: no such package here; pip install dreamsim")
    if kind == "clip":
        find([clip_asset(CLIP_KEY, clip or CLIP)], fetch=False)
