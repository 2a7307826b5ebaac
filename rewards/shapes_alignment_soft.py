"""Prompt alignment for the shapes model that autograd can follow: shapes_alignment.py's parts, made of smooth pieces.
Medians become weighted means, the best other shape a soft maximum: on drawings the two rank alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.shapes.detector import UNIT
from models.shapes.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, Thing, parse, signed_distance
from rewards import shapes_alignment as graded

INK_POWER = 8  # weight of a pixel in the object's colour: its RGB distance from the background to this power
TINY = 1e-3


class ShapesAlignmentSoft(graded.ShapesAlignment):
    name = "shapes_alignment_soft"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = []
        for picture, prompt in zip(images * 255, prompts, strict=True):
            scene = parse(prompt)
            middle = picture.shape[2] // 2
            pair = len(scene.things) == 2
            parts = [picture[:, :, :middle], picture[:, :, middle:]] if pair else [picture]
            things = zip(parts, scene.things, strict=True)
            scores.append(torch.stack([_score(part, thing, scene.background, pair) for part, thing in things]).mean())
        return torch.stack(scores)


def _score(picture: Tensor, thing: Thing, background: str | None, pair: bool) -> Tensor:
    """Of one object in its picture, or half picture, [3, H, W] in 0..255."""
    frame = [picture[:, :2], picture[:, -2:], picture[:, :, :2], picture[:, :, -2:]]
    ground = torch.cat([edge.flatten(1) for edge in frame], 1).mean(1)
    difference = _length(picture - ground[:, None, None])
    weight = (difference / difference.max()) ** INK_POWER
    ink = (picture * weight).sum((1, 2)) / (weight.sum() + TINY)
    direction = ink - ground
    alpha = ((picture - ground[:, None, None]) * direction[:, None, None]).sum(0) / (direction.square().sum() + 1)
    alpha = ((alpha - 0.15) / 0.7).clamp(0, 1)
    iou, radius, (cx, cy) = _fit(alpha)
    shape = SHAPES.index(thing.shape)

    def towards(place: str) -> Tensor:
        (x, y), (height, width) = PLACES[place], alpha.shape
        return x * (cx - width / 2) + y * (cy - height / 2)

    seen = _length(direction), _lead(iou, shape, 20.0), radius[shape], _margin(ink, COLOURS, thing.colour), towards
    whole = graded.thing_score(thing, pair, *seen, torch.sigmoid, torch.maximum)
    if background is None:
        return whole + graded.BACKGROUND_WEIGHT
    return whole + graded.BACKGROUND_WEIGHT * torch.sigmoid(graded.RGB_SLOPE * _margin(ground, BACKGROUNDS, background))


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
        distance = signed_distance(shape, x - cx + TINY, y - (cy - unit_y * r) + TINY, r, torch)
        ideal = (0.5 - distance).clamp(0, 1)
        ious.append(torch.minimum(alpha, ideal).sum() / (torch.maximum(alpha, ideal).sum() + TINY))
        radii.append(r)
    return torch.stack(ious), torch.stack(radii), (cx, cy)


def _margin(colour: Tensor, known: dict[str, tuple[int, int, int]], asked: str) -> Tensor:
    return _lead(-_length((colour.new_tensor(list(known.values())) - colour).T), list(known).index(asked), 0.1)


def _lead(values: Tensor, index: int, sharpness: float) -> Tensor:
    """How far the value at `index` is above a soft maximum of the others."""
    others = torch.cat([values[:index], values[index + 1 :]])
    return values[index] - (others * torch.softmax(sharpness * others, 0)).sum()


def _length(vectors: Tensor) -> Tensor:
    """Euclidean length over the first dimension, with a gradient everywhere."""
    return (vectors.square().sum(0) + TINY).sqrt()
