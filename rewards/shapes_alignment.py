"""Prompt alignment for the shapes model, by models/shapes/detector.py, without any network; not differentiable."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.shapes.detector import MIN_CONTRAST, along, halves, read
from models.shapes.world import BACKGROUNDS, COLOURS, PAIR_RADII, RADII, SHAPES, Scene, Thing, parse

BACKGROUND_WEIGHT, COLOUR_WEIGHT, FORM_WEIGHT = 0.15, 0.25, 0.6
IOU_SLOPE = 12.0  # per unit of IoU margin
RGB_SLOPE = 1 / 15  # per unit of RGB distance margin
SIZE_SLOPE = 0.8  # per pixel of radius outside the size's own range
PLACE_SLOPE, PLACE_MIDDLE = 0.3, 8.0  # per pixel towards the place, and where the score is one half
PLACE_WEIGHT = 0.5  # of form, when a place is named


class ShapesAlignment:
    """How nearly a picture shows what its prompt says: 0.15 background + 0.25 colour + 0.6 form, each a sigmoid of a
    margin, so [0, 1] a picture, and none flat near its top: small improvements show.

    Form is the overlap with the asked shape against the best other shape; when the prompt names a size, it is
    multiplied by how well the radius fits; when it names a place, half of form's weight goes to how far the object
    lies towards it. Two objects are read in the left and right half and averaged.
    """

    name = "shapes_alignment"
    differentiable = False

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ValueError, as scoring does, for a prompt that is not of the shapes world."""
        for prompt in prompts:
            parse(prompt)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = images.detach().clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).cpu().numpy()
        scores = [self.score(picture, parse(prompt)) for picture, prompt in zip(pixels, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def score(self, picture: np.ndarray, scene: Scene) -> float:
        """Of a picture [H, W, 3], values 0..255."""
        pair = len(scene.things) == 2
        things, backgrounds = [], []
        for part, thing in zip(halves(picture) if pair else [picture], scene.things, strict=True):
            reading, shape = read(part), SHAPES.index(thing.shape)
            iou_margin = _margin(-reading.iou, shape)
            hue_margin = _margin(reading.colour_distance, list(COLOURS).index(thing.colour))
            seen = reading.contrast, iou_margin, reading.radius_as[shape], hue_margin, functools.partial(along, reading)
            things.append(thing_score(thing, pair, *seen, _sigmoid, max))
            if scene.background is not None:
                margin = _margin(reading.background_distance, list(BACKGROUNDS).index(scene.background))
                backgrounds.append(_sigmoid(RGB_SLOPE * margin))
        return float(np.mean(things) + BACKGROUND_WEIGHT * np.mean(backgrounds or 1.0))


class ShapesAccuracy(ShapesAlignment):
    """1 where a picture shows every object with the asked colour, shape, size and place, else 0. For judging; a reward
    of two values is a poor one to train on."""

    name = "shapes_accuracy"

    def score(self, picture: np.ndarray, scene: Scene) -> float:
        from models.shapes.measure import correct  # here: it imports diffusers

        return float(correct(picture, scene))


def thing_score(
    thing: Thing, pair: bool, contrast: Any, iou_margin: Any, radius: Any, hue_margin: Any,
    towards: Callable[[str], Any], sigmoid: Callable[[Any], Any], maximum: Callable[[Any, Any], Any],
) -> Any:  # fmt: skip
    """Colour's and form's part of one object's score, of floats or of tensors.

    `iou_margin` and `hue_margin` are the asked shape's and colour's over the best other's, `radius` the object's as
    that shape, `towards` how many pixels from the middle it lies towards a place; `contrast` is in RGB distance.
    """
    form = sigmoid(IOU_SLOPE * iou_margin)
    if thing.size is not None or pair:
        low, high = PAIR_RADII if pair else RADII[thing.size or "medium"]
        form = form * sigmoid(-SIZE_SLOPE * (maximum(low - radius, radius - high) - 2))
    if thing.place is not None:
        there = sigmoid(PLACE_SLOPE * (towards(thing.place) - PLACE_MIDDLE))
        form = (1 - PLACE_WEIGHT) * form + PLACE_WEIGHT * there
    hue = sigmoid(RGB_SLOPE * hue_margin)
    return sigmoid((contrast - MIN_CONTRAST) / 10) * (COLOUR_WEIGHT * hue + FORM_WEIGHT * form)


def _margin(distance: np.ndarray, asked: int) -> float:
    """How much nearer the asked one is than the nearest other."""
    return np.delete(distance, asked).min() - distance[asked]


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))
