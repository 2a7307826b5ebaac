"""Feature vectors of pictures, by which diversity and drift are measured. Never rewards, never trained on."""

from __future__ import annotations

import importlib.util
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from rewards.aesthetic import CLIP, clip_asset, clip_tower
from rewards.names import FeatureKind
from rewards.network import short_side
from rewards.weights import WeightsNotFound, check, find


class Features(Protocol):
    def __call__(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B, F] float32."""
        ...


class Pixels:
    """Colours of an 8 x 8 grid as they differ from the picture's mean colour, and that: F = 195. For plain pictures
    such as the embedded model's; on photographs it sees layout and colour alone."""

    SIDE = 8
    OF_MEAN = 2.0  # weight beside the 64 cells

    def __call__(self, images: Tensor) -> Tensor:
        cells = F.adaptive_avg_pool2d(images.float(), self.SIDE).flatten(2) * 2 - 1
        mean = cells.mean(2)
        return torch.cat([(cells - mean[..., None]).flatten(1), self.OF_MEAN * mean], 1)


class Clip:
    """Image embedding of OpenAI's CLIP, of length 1."""

    def __init__(self, source: str, device: str) -> None:
        """`source`: folder or hub id, as transformers saves it.

        Raises:
            WeightsNotFound, BadWeights: see there.
        """
        [folder] = find([clip_asset("evaluation.clip", source)])
        self.network = clip_tower(folder, device)
        self.side = self.network.config.image_size

    def __call__(self, images: Tensor) -> Tensor:
        weight = next(self.network.parameters())
        pixels = short_side(images, self.side).to(weight.device, weight.dtype)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            return F.normalize(self.network(pixel_values=pixels).image_embeds, dim=-1)


class DreamSim:
    """DreamSim's embedding (arXiv 2306.09344), which was tuned to people's judgement of similarity. Of the package
    `dreamsim`, which downloads its weights itself; never run in development."""

    def __init__(self, device: str) -> None:
        """
        Raises:
            WeightsNotFound: the package is not here.
        """
        try:
            from dreamsim import dreamsim
        except ImportError as error:
            raise WeightsNotFound(f"evaluation.features: dreamsim: {error}; pip install dreamsim") from error
        self.model, _ = dreamsim(pretrained=True, device=device)
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        resized = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
        with torch.no_grad():
            return self.model.embed(resized.to(self.device)).float()


def load(kind: FeatureKind, clip: str | None = None, device: str = "cpu") -> Features:
    """
    Raises:
        WeightsNotFound, BadWeights: see there.
    """
    if kind == "pixels":
        return Pixels()
    return Clip(clip or CLIP, device) if kind == "clip" else DreamSim(device)


def require(kind: FeatureKind, clip: str | None = None) -> None:
    """Is all there that `load` reads? Nothing is downloaded.

    Raises:
        WeightsNotFound: it is not.
    """
    if kind == "dreamsim" and importlib.util.find_spec("dreamsim") is None:
        raise WeightsNotFound("evaluation.features: dreamsim: no such package here; pip install dreamsim")
    if kind == "clip":
        check([clip_asset("evaluation.clip", clip or CLIP)])
