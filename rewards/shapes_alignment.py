"""Prompt alignment for the shapes model, by geometry alone: graded, right or wrong, and with a gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.shapes import world
from models.shapes.detector import MIN_CONTRAST, UNIT, halves, read
from models.shapes.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, PLACES, SHAPES, Scene, Thing, parse

BACKGROUND_WEIGHT, COLOUR_WEIGHT, FORM_WEIGHT = 0.15, 0.25, 0.6
IOU_SLOPE = 12.0  # per unit of IoU margin
RGB_SLOPE = 1 / 15  # per unit of RGB distance margin
SIZE_SLOPE = 0.8  # per pixel of radius outside the size's own range
PLACE_SLOPE, PLACE_MIDDLE = 0.3, 8.0  # per pixel towards the place, and where the score is one half
PLACE_WEIGHT = 0.5  # of form, when a place is named
INK_POWER = 8  # weight of a pixel in the object's colour: its RGB distance from the background to this power
TINY = 1e-3


class ShapesAlignment:
    """How nearly a picture shows what its prompt says: 0.15 background + 0.25 colour + 0.6 form, each a sigmoid of a
    margin, so [0, 1] a picture, and none flat near its top: small improvements show.

    Form is the overlap with the asked shape against the best other shape; when the prompt names a size, it is
    multiplied by how well the radius fits; when it names a place, half of form's weight goes to how far the object
    lies towards it. Two objects are read in the left and right half and averaged. A colour or shape that the prompt
    leaves open is taken as the one that fits best, over the second best; an open background has full marks."""

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
            reading = read(part)
            shape = SHAPES.index(thing.shape) if thing.shape else int(reading.iou.argmax())
            iou_margin = _margin(-reading.iou, shape)
            hue = list(COLOURS).index(thing.colour) if thing.colour else int(reading.colour_distance.argmin())
            hue_margin = _margin(reading.colour_distance, hue)
            offset = reading.centre[0] - IMAGE_SIZE / 2, reading.centre[1] - IMAGE_SIZE / 2
            seen = reading.contrast, iou_margin, reading.radius_as[shape], hue_margin, offset
            things.append(thing_score(thing, pair, *seen, _sigmoid, max))
            if scene.background is not None:
                margin = _margin(reading.background_distance, list(BACKGROUNDS).index(scene.background))
                backgrounds.append(_sigmoid(RGB_SLOPE * margin))
        return float(np.mean(things) + BACKGROUND_WEIGHT * np.mean(backgrounds or 1.0))


class ShapesAccuracy(ShapesAlignment):
    """1 where a picture shows every object with the asked colour, shape, size and place (any known colour and shape
    where the prompt leaves them open), else 0. For judging; a reward of two values is a poor one to train on."""

    name = "shapes_accuracy"

    def score(self, picture: np.ndarray, scene: Scene) -> float:
        from models.shapes.measure import correct  # here: it imports diffusers

        return float(correct(picture, scene))


def thing_score(
    thing: Thing, pair: bool, contrast: Any, iou_margin: Any, radius: Any, hue_margin: Any,
    offset: tuple[Any, Any], sigmoid: Callable[[Any], Any], maximum: Callable[[Any, Any], Any],
) -> Any:  # fmt: skip
    """Colour's and form's part of one object's score, of floats or of tensors.

    `iou_margin` and `hue_margin` are the asked shape's and colour's over the best other's, `radius` the object's as
    that shape, `offset` (x, y) that of its centroid from the middle, in pixels; `contrast` is in RGB distance."""
    form = sigmoid(IOU_SLOPE * iou_margin)
    if thing.size is not None or pair:
        low, high = world.PAIR_RADII if pair else world.RADII[thing.size or "medium"]
        form = form * sigmoid(-SIZE_SLOPE * (maximum(low - radius, radius - high) - 2))
    if thing.place is not None:
        x, y = PLACES[thing.place]
        there = sigmoid(PLACE_SLOPE * (x * offset[0] + y * offset[1] - PLACE_MIDDLE))
        form = (1 - PLACE_WEIGHT) * form + PLACE_WEIGHT * there
    hue = sigmoid(RGB_SLOPE * hue_margin)
    return sigmoid((contrast - MIN_CONTRAST) / 10) * (COLOUR_WEIGHT * hue + FORM_WEIGHT * form)


def _margin(distance: np.ndarray, asked: int) -> float:
    """How much nearer the asked one is than the nearest other."""
    return np.delete(distance, asked).min() - distance[asked]


def _sigmoid(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


class ShapesAlignmentSoft(ShapesAlignment):
    """The same parts made of smooth pieces, with a gradient to the images. Medians become weighted means, the best
    other shape a soft maximum: on drawings the two rank alike, on formless noise they may not."""

    name = "shapes_alignment_soft"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = []
        for picture, scene in zip(images * 255, map(parse, prompts), strict=True):
            pair, middle = len(scene.things) == 2, picture.shape[2] // 2
            parts = [picture[:, :, :middle], picture[:, :, middle:]] if pair else [picture]
            things = zip(parts, scene.things, strict=True)
            seen = [_soft_score(part, thing, scene.background, pair) for part, thing in things]
            scores.append(torch.stack(seen).mean())
        return torch.stack(scores)


@dataclass(frozen=True)
class SoftReading:
    """What one object's picture holds, with a gradient to it: RGB [3] of background and ink, and their difference, IoU
    and radius [shapes] as each shape, centroid (x, y) in pixels."""

    ground: Tensor
    ink: Tensor
    direction: Tensor
    iou: Tensor
    radius: Tensor
    centre: tuple[Tensor, Tensor]


def read_softly(picture: Tensor) -> SoftReading:
    """Of a picture [3, H, W] in 0..255, made of smooth pieces."""
    frame = [picture[:, :2], picture[:, -2:], picture[:, :, :2], picture[:, :, -2:]]
    ground = torch.cat([edge.flatten(1) for edge in frame], 1).mean(1)
    difference = length(picture - ground[:, None, None])
    weight = (difference / difference.max()) ** INK_POWER
    ink = (picture * weight).sum((1, 2)) / (weight.sum() + TINY)
    direction = ink - ground
    alpha = ((picture - ground[:, None, None]) * direction[:, None, None]).sum(0) / (direction.square().sum() + 1)
    alpha = ((alpha - 0.15) / 0.7).clamp(0, 1)
    return SoftReading(ground, ink, direction, *_fit(alpha))


def _soft_score(picture: Tensor, thing: Thing, background: str | None, pair: bool) -> Tensor:
    """Of one object in its picture, or half picture, [3, H, W] in 0..255."""
    read, (_, height, width) = read_softly(picture), picture.shape
    shape = SHAPES.index(thing.shape) if thing.shape else int(read.iou.argmax())
    offset = (read.centre[0] - width / 2, read.centre[1] - height / 2)
    contrast, lead, radius = length(read.direction), _lead(read.iou, shape, 20.0), read.radius[shape]
    seen = contrast, lead, radius, _soft_margin(read.ink, COLOURS, thing.colour), offset
    whole = thing_score(thing, pair, *seen, torch.sigmoid, torch.maximum)
    if background is None:
        return whole + BACKGROUND_WEIGHT
    return whole + BACKGROUND_WEIGHT * torch.sigmoid(RGB_SLOPE * _soft_margin(read.ground, BACKGROUNDS, background))


def _fit(alpha: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Soft IoU [shapes] and radius [shapes] of every shape's drawing of the area and centroid of `alpha` [H, W]."""
    height, width = alpha.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    x, y = x.to(alpha), y.to(alpha)
    area = alpha.sum() + TINY
    cx, cy = (alpha * x).sum() / area, (alpha * y).sum() / area
    ious, radii = [], []
    for shape in SHAPES:
        unit_area, unit_y = UNIT[shape]
        r = (area / unit_area).sqrt()
        # A little off the centroid: hypot and the angle have no derivative at the very middle.
        distance = world.signed_distance(shape, x - cx + TINY, y - (cy - unit_y * r) + TINY, r, torch)
        ideal = (0.5 - distance).clamp(0, 1)
        ious.append(torch.minimum(alpha, ideal).sum() / (torch.maximum(alpha, ideal).sum() + TINY))
        radii.append(r)
    return torch.stack(ious), torch.stack(radii), (cx, cy)


def _soft_margin(colour: Tensor, known: dict[str, tuple[int, int, int]], asked: str | None) -> Tensor:
    nearness = -length((colour.new_tensor(list(known.values())) - colour).T)
    return _lead(nearness, list(known).index(asked) if asked else int(nearness.argmax()), 0.1)


def _lead(values: Tensor, index: int, sharpness: float) -> Tensor:
    """How far the value at `index` is above a soft maximum of the others."""
    others = torch.cat([values[:index], values[index + 1 :]])
    return values[index] - (others * torch.softmax(sharpness * others, 0)).sum()


def length(vectors: Tensor) -> Tensor:
    """Euclidean length over the first dimension, with a gradient everywhere."""
    return (vectors.square().sum(0) + TINY).sqrt()
