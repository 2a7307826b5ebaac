"""The detector on true drawings, on what is no drawing, and on broken ones."""

import numpy as np
import pytest

from models.shapes.detector import detect, read
from models.shapes.measure import correct, scenes
from models.shapes.world import COLOURS, HELD_OUT, SEEN, SHAPES, Scene, Thing, draw, parse, training_scene


@pytest.mark.parametrize("kind", ["seen", "held-out", "large", "small", "two"])
def test_reads_true_drawings(kind):
    rng = np.random.default_rng(3)
    asked = scenes(kind, 200)
    assert np.mean([correct(draw(scene, rng), scene) for scene in asked]) >= 0.98


def test_survives_blur_and_noise():
    rng = np.random.default_rng(0)
    right = 0
    for scene in scenes("seen", 100):
        noisy = draw(scene, rng).astype(float) + rng.normal(0, 12, (64, 64, 3))
        thing = scene.things[0]
        right += detect(np.clip(noisy, 0, 255).astype(np.uint8)) == (thing.colour, thing.shape)
    assert right >= 95


def test_empty_and_formless_pictures_hold_nothing():
    assert detect(np.full((64, 64, 3), 245, np.uint8)) == (None, None)
    rng = np.random.default_rng(0)
    assert detect(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)) == (None, None)
    with pytest.raises(ValueError, match="H, W, 3"):
        read(np.zeros((64, 64), np.uint8))


def test_held_out_pairs_never_occur_in_training():
    rng = np.random.default_rng(0)
    drawn = {(thing.colour, thing.shape) for _ in range(3000) for thing in training_scene(rng).things}
    assert drawn == set(SEEN) and not drawn & HELD_OUT
    assert len(HELD_OUT) * 8 == len(COLOURS) * len(SHAPES)


def test_captions_are_read_back_and_foreign_ones_refused():
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = training_scene(rng)
        assert parse(scene.caption()) == scene
    assert parse("a red circle") == Scene((Thing("red", "circle"),), None)
    for foreign in ("a dog", "a red circle on a plaid background", "a red star and a blue star and a pink star"):
        with pytest.raises(ValueError, match="prompt"):
            parse(foreign)
