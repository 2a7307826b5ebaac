"""Strict prompt accuracy for the shapes model: 1 where a picture shows what its prompt says, else 0. For judging; a
reward of two values is a poor one to train on (shapes_alignment is graded)."""

import numpy as np

from models.shapes.measure import correct
from models.shapes.world import Scene
from rewards.shapes_alignment import ShapesAlignment


class ShapesAccuracy(ShapesAlignment):
    """By models/shapes/detector.py: every object with the asked colour, shape, size and place."""

    name = "shapes_accuracy"

    def score(self, picture: np.ndarray, scene: Scene) -> float:
        return float(correct(picture, scene))
