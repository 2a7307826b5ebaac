"""Reads a picture of the shapes world back, by geometry alone: no network, no training.

The background is the median of the frame; the object is whatever differs from it; its shape is the one
whose ideal drawing, of the same area at the same centroid, overlaps it best (soft IoU).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.shapes.world import BACKGROUNDS, COLOURS, IMAGE_SIZE, PLACES, SHAPES, signed_distance

MIN_IOU = 0.6  # below this the blob is no shape at all
MIN_CONTRAST = 40.0  # RGB distance from the background that an object must reach somewhere
MIN_AREA = 30.0  # pixels

_COLOUR_TABLE = np.array(list(COLOURS.values()), np.float32)
_BACKGROUND_TABLE = np.array(list(BACKGROUNDS.values()), np.float32)


def _unit_properties(shape: str) -> tuple[float, float]:
    """Area and vertical centroid of the shape at radius 1, measured once on a fine grid."""
    axis = (np.arange(400) + 0.5) / 160 - 1.25
    inside = signed_distance(shape, axis[None, :].repeat(400, 0), axis[:, None].repeat(400, 1), 1.0) < 0
    return float(inside.sum() / 160**2), float((inside * axis[:, None]).sum() / inside.sum())


# Area and vertical centroid of every shape at radius 1.
UNIT = {shape: _unit_properties(shape) for shape in SHAPES}


@dataclass(frozen=True)
class Reading:
    """What the detector sees in one picture, or in one half of it.

    `iou` [shapes] is each shape's soft overlap in [0, 1]; `radius_as` [shapes] the radius in pixels the object
    would have as each shape, `radius` that of the best; `centre` (x, y)
    the pixel of its centroid; `contrast` the object's RGB distance from the
    background; distances are RGB distances (0..441) to every known colour and background, in table order.
    `found` is False for an empty or formless picture; then the other fields hold what was measured anyway.
    """

    found: bool
    colour: str | None
    shape: str | None
    radius: float
    centre: tuple[float, float]
    background: str
    contrast: float
    iou: np.ndarray
    radius_as: np.ndarray
    colour_distance: np.ndarray
    background_distance: np.ndarray


def read(image: np.ndarray) -> Reading:
    """Read a picture [H, W, 3] uint8 (or float in 0..255) that holds at most one object.

    Raises:
        ValueError: not an [H, W, 3] array.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected an image [H, W, 3], got {list(image.shape)}")
    pixels = image.astype(np.float32)
    frame = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                            pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    ground = np.median(frame, axis=0)
    ground_distance = np.linalg.norm(_BACKGROUND_TABLE - ground, axis=1)
    difference = np.linalg.norm(pixels - ground, axis=2)
    peak = float(np.quantile(difference, 0.995))
    ink = pixels[difference >= 0.8 * peak].reshape(-1, 3)
    ink_colour = np.median(ink, axis=0)
    colour_distance = np.linalg.norm(_COLOUR_TABLE - ink_colour, axis=1)
    direction = ink_colour - ground
    alpha = np.clip((pixels - ground) @ direction / max(float(direction @ direction), 1.0), 0.0, 1.0)
    # Faint texture of the background is not ink.
    alpha = np.clip((alpha - 0.15) / 0.7, 0.0, 1.0)
    iou, radius, centre = _fit(alpha)
    best = int(iou.argmax())
    found = bool(peak >= MIN_CONTRAST and alpha.sum() >= MIN_AREA and iou[best] >= MIN_IOU)
    return Reading(
        found=found,
        colour=list(COLOURS)[int(colour_distance.argmin())] if found else None,
        shape=SHAPES[best] if found else None,
        radius=float(radius[best]),
        centre=centre,
        background=list(BACKGROUNDS)[int(ground_distance.argmin())],
        contrast=peak,
        iou=iou,
        radius_as=radius,
        colour_distance=colour_distance,
        background_distance=ground_distance,
    )


def detect(image: np.ndarray) -> tuple[str | None, str | None]:
    """Colour and shape of the one object in a picture [H, W, 3] uint8; (None, None) when there is none."""
    reading = read(image)
    return reading.colour, reading.shape


def along(reading: Reading, place: str) -> float:
    """Pixels from the middle of the picture to the object's centroid, in the direction of `place`."""
    x, y = PLACES[place]
    return x * (reading.centre[0] - IMAGE_SIZE / 2) + y * (reading.centre[1] - IMAGE_SIZE / 2)


def halves(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Left and right half of a picture [H, W, 3], where a scene of two objects puts them."""
    middle = image.shape[1] // 2
    return image[:, :middle], image[:, middle:]


def _fit(alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    """Soft IoU [shapes] and radius [shapes] of every shape's drawing of the same area and centroid, and that."""
    area = float(alpha.sum())
    height, width = alpha.shape
    if area < 1.0:
        return np.zeros(len(SHAPES), np.float32), np.zeros(len(SHAPES), np.float32), (width / 2, height / 2)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    cx, cy = float((alpha * x).sum() / area), float((alpha * y).sum() / area)
    ious, radii = [], []
    for shape in SHAPES:
        unit_area, unit_y = UNIT[shape]
        r = min(float(np.sqrt(area / unit_area)), float(IMAGE_SIZE))
        ideal = np.clip(0.5 - signed_distance(shape, x - cx, y - (cy - unit_y * r), r), 0.0, 1.0)
        ious.append(float(np.minimum(alpha, ideal).sum() / np.maximum(alpha, ideal).sum()))
        radii.append(r)
    return np.array(ious, np.float32), np.array(radii, np.float32), (cx, cy)
