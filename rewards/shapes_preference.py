"""What a picture of the shapes world shows, rewarded whatever its prompt says: for prompts with several right answers.

score = colours[the object's colour] + shapes[its shape] + place_x * (x of its centroid, pixels to the right of the
middle). What `colours` and `shapes` do not name counts 0, and so does a picture that holds no object."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.shapes.detector import read
from models.shapes.world import COLOURS, IMAGE_SIZE, SHAPES
from rewards.shapes_alignment import length, read_softly

COLOUR_SHARPNESS = 0.1  # per unit of RGB distance
SHAPE_SHARPNESS = 20.0  # per unit of IoU


class ShapesPreference:
    """By the detector: colour and shape are one of those known."""

    name = "shapes_preference"
    differentiable = False

    def __init__(
        self, colours: dict[str, float] | None = None, shapes: dict[str, float] | None = None, place_x: float = 0.0
    ) -> None:
        """Raises ValueError for a colour or shape that is not of this world, or where nothing is preferred."""
        self.colours, self.shapes, self.place_x = dict(colours or {}), dict(shapes or {}), float(place_x)
        for kind, given, known in (("colours", self.colours, COLOURS), ("shapes", self.shapes, SHAPES)):
            if unknown := [name for name in given if name not in known]:
                raise ValueError(f"reward.options: {kind} has {unknown[0]!r}; known: {', '.join(known)}")
        if not (self.colours or self.shapes or self.place_x):
            raise ValueError(f"reward.options: {self.name} prefers nothing; give colours, shapes or place_x")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = images.detach().clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).cpu().numpy()
        return torch.tensor([self.score(picture) for picture in pixels], dtype=torch.float32)

    def score(self, picture: np.ndarray) -> float:
        """Of a picture [H, W, 3], values 0..255."""
        reading = read(picture)
        if not reading.found:
            return 0.0
        there = self.place_x * (reading.centre[0] - IMAGE_SIZE / 2)
        return self.colours.get(reading.colour or "", 0.0) + self.shapes.get(reading.shape or "", 0.0) + there


class ShapesPreferenceSoft(ShapesPreference):
    """The same of smooth pieces, with a gradient to the images: shares of each colour and shape."""

    name = "shapes_preference_soft"
    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return torch.stack([self._of(picture) for picture in images * 255])

    def _of(self, picture: Tensor) -> Tensor:
        read = read_softly(picture)
        distance = length((read.ink.new_tensor(list(COLOURS.values())) - read.ink).T)
        colours = read.ink.new_tensor([self.colours.get(name, 0.0) for name in COLOURS])
        shapes = read.ink.new_tensor([self.shapes.get(name, 0.0) for name in SHAPES])
        by_colour = (torch.softmax(-COLOUR_SHARPNESS * distance, 0) * colours).sum()
        by_shape = (torch.softmax(SHAPE_SHARPNESS * read.iou, 0) * shapes).sum()
        return by_colour + by_shape + self.place_x * (read.centre[0] - picture.shape[2] / 2)
