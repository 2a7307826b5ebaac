"""What evaluation images are judged by beside the reward that is trained on: held-out rewards, and features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rewards import features, registry
from rewards.features import Features
from rewards.names import FeatureKind
from rewards.weighted_sum import Term, each_term, read_terms

WHERE = "evaluation.held_out"
HeldOut = Sequence[str | dict[str, Any]]  # names, or {name, weights?, options?}


@dataclass
class Judges:
    """Rewards [by label] and a feature extractor for finished pictures."""

    held_out: dict[str, registry.Reward]
    features: Features

    def __call__(
        self, pictures: np.ndarray, prompts: Sequence[str], batch: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """pictures [B, H, W, 3] uint8, as they would be saved -> each held-out reward's scores [B] by label, and
        features [B, F], float32. `batch` pictures at once. Raises BadReward where a reward raised."""
        scores: dict[str, list[np.ndarray]] = {label: [] for label in self.held_out}
        vectors: list[np.ndarray] = []
        for start in range(0, len(pictures), batch):
            images = torch.from_numpy(pictures[start : start + batch]).permute(0, 3, 1, 2).float() / 255
            with torch.no_grad():
                for label, reward in self.held_out.items():
                    with registry.named_failure(registry.BadReward, f"{WHERE}: {label}", reward):
                        values = reward(images, list(prompts[start : start + batch]))
                    scores[label].append(values.detach().float().cpu().numpy())
                vectors.append(self.features(images).float().cpu().numpy())
        return {label: np.concatenate(parts) for label, parts in scores.items()}, np.concatenate(vectors)


def build(held_out: HeldOut, kind: FeatureKind, clip: str | None, device: str) -> Judges:
    """Raises ValueError as `check` does, and for a reward that cannot be made."""
    return Judges(each_term(_terms(held_out), lambda term: term.load(device), WHERE), features.load(kind, clip, device))


def check(held_out: HeldOut, kind: FeatureKind, clip: str | None, prompts: Sequence[str]) -> None:
    """Raises ValueError naming the entry of evaluation.held_out, or evaluation.features, where `build` would fail, or a
    reward refuse a prompt."""
    each_term(_terms(held_out), lambda term: term.check(prompts), WHERE)
    features.require(kind, clip)


def labels(held_out: HeldOut) -> list[str]:
    """What the scores will be called."""
    return list(_terms(held_out))


def _terms(held_out: HeldOut) -> dict[str, Term]:
    entries = [{"name": entry} if isinstance(entry, str) else entry for entry in held_out]
    if weighted := [index for index, entry in enumerate(entries) if "weight" in entry]:
        raise ValueError(f"{WHERE}[{weighted[0]}]: a held-out reward has no weight")
    return read_terms([{**entry, "weight": 1.0} for entry in entries], WHERE) if entries else {}
