"""The fixed evaluation images of a run: as rows of Parquet, and what they say of an epoch."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from diffusion.trajectory import Scores
from evaluation import collapse, metrics
from evaluation.collapse import Evaluated
from evaluation.metrics import mean_of_good
from records.run_folder import BEFORE, IMAGES, Records, parquet

Draw = Callable[[Sequence[Scores]], bytes]  # a contact sheet, PNG


@dataclass(frozen=True)
class Judge:
    """Records an evaluation of a run and says what it found. Called by the epoch loop with an epoch and its scores."""

    records: Records
    thumbnail_pixels: int
    draw: Draw

    def __call__(self, epoch: int, scores: Sequence[Scores]) -> dict[str, Any]:
        """What a line of metrics.jsonl has of it: means of the good images' rewards, diversity, and signs of collapse
        since before training.

        Raises:
            StorageError: it could not be recorded.
        """
        self.records.save_evaluation(epoch, image_rows(scores, self.thumbnail_pixels), self.draw(scores))
        now = read_images(self.records.images(epoch))
        found: dict[str, Any] = {"eval_reward_mean": mean_of_good(now.rewards)}
        found |= {f"eval_reward_mean/{label}": mean_of_good(values) for label, values in now.held_out.items()}
        if now.features is not None:
            found["eval_vendi"] = metrics.vendi(now.features)
            found["eval_distance"] = mean_of_good(metrics.prompt_distances(now.features, now.prompts))
        if epoch != BEFORE and BEFORE in self.records.evaluated():
            before = read_images(self.records.images(BEFORE))
            found["collapse"] = "; ".join(collapse.signs(before, now)) or None
        return found


def image_rows(scores: Sequence[Scores], thumbnail_pixels: int) -> list[dict[str, Any]]:
    """Evaluation images as rows, columns of IMAGES; no thumbnails at 0 pixels."""
    return [
        {
            "number": number,
            "prompt": part.chunk.prompts[i],
            "reward": float(part.rewards[i, -1]) if math.isfinite(part.rewards[i, -1]) else None,
            "reward_parts": [(label, float(values[i])) for label, values in part.parts.items()],
            "held_out": [(label, float(values[i])) for label, values in part.held_out.items()],
            "features": None if part.features is None else part.features[i],
            "thumbnail_png": _thumbnail(part.images[i], thumbnail_pixels) if part.images is not None else None,
            "bad": part.bad.get(i),
        }
        for part in scores
        for i, number in enumerate(part.chunk.trajectory_ids)
    ]


def images_table(scores: Sequence[Scores], thumbnail_pixels: int) -> bytes:
    """The same as a Parquet file."""
    return parquet(image_rows(scores, thumbnail_pixels), IMAGES)


def read_images(content: bytes) -> Evaluated:
    """What `images_table` wrote, as far as figures need it."""
    table = pq.read_table(io.BytesIO(content))
    held_out = [dict(row) for row in table["held_out"].to_pylist()]
    features = table["features"].to_pylist()
    return Evaluated(
        table["prompt"].to_pylist(),
        np.array([np.nan if value is None else value for value in table["reward"].to_pylist()], np.float64),
        {label: np.array([row[label] for row in held_out], np.float64) for label in held_out[0]},
        None if features[0] is None else np.array(features, np.float32),
    )


def _thumbnail(pixels: np.ndarray, side: int) -> bytes | None:
    """PNG file of a picture [H, W, 3] uint8, no larger than `side`; None at 0."""
    if not side:
        return None
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    picture.save(file, "PNG")
    return file.getvalue()
