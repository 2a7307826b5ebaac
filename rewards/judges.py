"""What evaluation images are judged by beside the reward that is trained on: held-out rewards, and features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rewards import registry
from rewards.contract import Columns, Reward, call
from rewards.names import FeatureKind
from rewards.network import short_side
from rewards.own_code import named_failure
from rewards.weighted_sum import Term, each_term, read_terms
from rewards.weights import find

Features = Callable[[Tensor], Tensor]  # images [B, 3, H, W] in [0, 1] -> [B, F] float32; never trained on
Arrays = dict[str, np.ndarray]
SIDE = 8  # of the grid of cells
OF_MEAN = 2.0  # weight of the mean colour beside the 64 cells
WHERE = "evaluation.held_out"
HeldOut = Sequence[str | dict[str, Any]]  # names, or {name, weights?, options?}


@dataclass
class Judges:
    """Rewards [by label] and a feature extractor for finished pictures."""

    held_out: dict[str, Reward]
    features: Features

    def __call__(
        self, pictures: np.ndarray, prompts: Sequence[str], batch: int, metadata: Sequence[Columns] = ()
    ) -> tuple[Arrays, np.ndarray]:
        """pictures [B, H, W, 3] uint8, as they would be saved -> each held-out reward's scores [B] by label, and
        features [B, F], float32. `batch` pictures at once. Raises BadReward where a reward raised."""
        scores, vectors = {label: list[np.ndarray]() for label in self.held_out}, list[np.ndarray]()
        for start in range(0, len(pictures), batch):
            part = slice(start, start + batch)
            images = torch.from_numpy(pictures[part]).permute(0, 3, 1, 2).float() / 255
            with torch.no_grad():
                for label, reward in self.held_out.items():
                    with named_failure(registry.BadReward, f"{WHERE}: {label}"):
                        values = call(reward, images, list(prompts[part]), metadata[part])
                    scores[label].append(values.detach().float().cpu().numpy())
                vectors.append(self.features(images).float().cpu().numpy())
        return {label: np.concatenate(parts) for label, parts in scores.items()}, np.concatenate(vectors)


def build(held_out: HeldOut, kind: FeatureKind, clip: str | None, device: str) -> Judges:
    """Raises ValueError as `check`, or for a reward that cannot be made."""
    return Judges(each_term(terms(held_out), lambda term: term.load(device), WHERE), load_features(kind, clip, device))


def check(held_out: HeldOut, kind: FeatureKind, clip: str | None, prompts: Sequence[str]) -> None:
    """Raises ValueError, which names the setting, where `build` would fail, or a reward refuse a prompt."""
    each_term(terms(held_out), lambda term: term.check(prompts), WHERE)
    require_features(kind, clip)


def labels(held_out: HeldOut) -> list[str]:
    """What the scores will be called."""
    return list(terms(held_out))


def terms(held_out: HeldOut) -> dict[str, Term]:
    """By label. Raises ValueError, which names the entry that is none."""
    entries = [{"name": entry} if isinstance(entry, str) else entry for entry in held_out]
    if weighted := [index for index, entry in enumerate(entries) if "weight" in entry]:
        raise ValueError(f"{WHERE}[{weighted[0]}]: a held-out reward has no weight")
    return read_terms([{**entry, "weight": 1.0} for entry in entries], WHERE) if entries else {}


def pixels(images: Tensor) -> Tensor:
    """Colours of an 8 x 8 grid as they differ from the picture's mean colour, and that: F = 195. For plain pictures
    such as the embedded model's; on photographs it sees layout and colour alone."""
    cells = F.adaptive_avg_pool2d(images.float(), SIDE).flatten(2) * 2 - 1
    mean = cells.mean(2)
    return torch.cat([(cells - mean[..., None]).flatten(1), OF_MEAN * mean], 1)


def load_features(kind: FeatureKind, clip: str | None = None, device: str = "cpu") -> Features:
    """`clip`: OpenAI's CLIP, a folder or hub id as transformers saves it; its image embedding has length 1. Raises
    WeightsNotFound, BadWeights."""
    if kind == "pixels":
        return pixels
    from rewards.aesthetic import clip_tower  # here: transformers takes a second

    model = clip_tower(require_features(kind, clip, fetch=True)[0], device)

    def embed(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            seen = short_side(images, model.config.image_size).to(device, torch.float32)
            return F.normalize(model(pixel_values=seen).image_embeds, dim=-1)

    return embed


def require_features(kind: FeatureKind, clip: str | None = None, fetch: bool = False) -> list[Any]:
    """The paths that `load_features` reads, as `weights.find`; raises WeightsNotFound where not all is there."""
    if kind == "pixels":
        return []
    from rewards.aesthetic import CLIP, clip_asset

    return find([clip_asset("evaluation.clip", clip or CLIP)], fetch)
