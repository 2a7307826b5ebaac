"""The detector on true drawings, on what is no drawing, and on broken ones."""

import numpy as np
import pytest

from models.shapes.detector import detect, read
from models.shapes.measure import KINDS, correct, evenness, law, scenes
from models.shapes.world import COLOURS, HELD_OUT, SEEN, SHAPES, draw, parse, training_scene


@pytest.mark.parametrize("kind", KINDS)
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


def test_a_strict_reading_of_an_open_scene_takes_any_object_but_wants_one():
    rng = np.random.default_rng(4)
    red_star, empty = draw(parse("a red star on a sand background"), rng), np.full((64, 64, 3), 245, np.uint8)
    for caption, right in {
        "a shape": True, "a star": True, "a red shape": True, "a red star": True, "a ring": False,
        "a blue shape": False, "a large shape": False, "a shape at the right": False, "a shape and a shape": False,
    }.items():  # fmt: skip
        assert correct(red_star, parse(caption)) is right and not correct(empty, parse(caption)), caption


def test_drawings_leave_open_what_the_scene_does_and_the_law_of_it_is_even():
    rng = np.random.default_rng(0)
    assert all(evenness(counts) > 0.97 for counts in law(drawings("a shape", 300, rng)).values())
    read_back = law(drawings("a red ring on a gray background", 20, rng))
    assert {max(counts, key=counts.get) for counts in read_back.values()} == {"red", "ring", "gray"}
    assert [evenness(counts) for counts in read_back.values()] == [0, 0, 0]
    assert evenness({"a": 2, "b": 2, "c": 0, "d": 0}) == pytest.approx(0.5)
    assert all(sum(counts.values()) == 0 for counts in law(np.full((2, 64, 64, 3), 245, np.uint8)).values())


def drawings(caption: str, count: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([draw(parse(caption), rng) for _ in range(count)])
