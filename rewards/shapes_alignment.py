"""Graded prompt alignment for the shapes model: how nearly a picture shows what its prompt says.

Every part is graded and none is flat near its top, so that small improvements show. Read by
models/shapes/detector.py, without any network; not differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.shapes.detector import MIN_CONTRAST, Reading, along, halves, read
from models.shapes.world import BACKGROUNDS, COLOURS, PAIR_RADII, RADII, SHAPES, Scene, Thing, parse

BACKGROUND_WEIGHT, COLOUR_WEIGHT, FORM_WEIGHT = 0.15, 0.25, 0.6
IOU_SLOPE = 12.0  # per unit of IoU margin
RGB_SLOPE = 1 / 15  # per unit of RGB distance margin
SIZE_SLOPE = 0.8  # per pixel of radius outside the size's own range
PLACE_SLOPE, PLACE_MIDDLE = 0.3, 8.0  # per pixel towards the place, and where the score is one half
PLACE_WEIGHT = 0.5  # of form, when a place is named


class ShapesAlignment:
    """0.15 background + 0.25 colour + 0.6 form, each a sigmoid of a margin, so [0, 1] a picture.

    Form is the overlap with the asked shape against the best other shape; when the prompt names a size, it is
    multiplied by how well the radius fits; when it names a place, half of form's weight goes to how far the object
    lies towards it. Two objects are read in the left and right half and averaged.
    """

    name = "shapes_alignment"
    differentiable = False

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for the first prompt that is not of the shapes world."""
        for prompt in prompts:
            parse(prompt)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """
        Raises:
            ValueError: a prompt that is not of the shapes world, naming it.
        """
        pixels = images.detach().clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).cpu().numpy()
        scores = [score(picture, parse(prompt)) for picture, prompt in zip(pixels, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)


def score(image: np.ndarray, scene: Scene) -> float:
    """Alignment in [0, 1] of a picture [H, W, 3], values 0..255, with a scene."""
    parts = [image] if len(scene.things) == 1 else list(halves(image))
    pair = len(parts) == 2
    readings = [read(part) for part in parts]
    things = np.mean([_thing(reading, thing, pair) for reading, thing in zip(readings, scene.things, strict=True)])
    return float(things + BACKGROUND_WEIGHT * np.mean([_background(reading, scene.background) for reading in readings]))


def _thing(reading: Reading, thing: Thing, pair: bool) -> float:
    shape, colour = SHAPES.index(thing.shape), list(COLOURS).index(thing.colour)
    contrast = _sigmoid((reading.contrast - MIN_CONTRAST) / 10)
    form = _sigmoid(IOU_SLOPE * (reading.iou[shape] - np.delete(reading.iou, shape).max()))
    if thing.size is not None or pair:
        low, high = PAIR_RADII if pair else RADII[thing.size or "medium"]
        outside = max(low - reading.radius_as[shape], reading.radius_as[shape] - high)
        form *= _sigmoid(-SIZE_SLOPE * (outside - 2))
    if thing.place is not None:
        there = _sigmoid(PLACE_SLOPE * (along(reading, thing.place) - PLACE_MIDDLE))
        form = (1 - PLACE_WEIGHT) * form + PLACE_WEIGHT * there
    hue = _margin(reading.colour_distance, colour)
    return contrast * (COLOUR_WEIGHT * hue + FORM_WEIGHT * form)


def _background(reading: Reading, asked: str | None) -> float:
    return 1.0 if asked is None else _margin(reading.background_distance, list(BACKGROUNDS).index(asked))


def _margin(distance: np.ndarray, target: int) -> float:
    return _sigmoid(RGB_SLOPE * (np.delete(distance, target).min() - distance[target]))


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))
