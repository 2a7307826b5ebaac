"""Captions of the shapes world: whole ones, open ones, and what training says of its drawings."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from models.shapes import world
from models.shapes.world import BACKGROUNDS, COLOURS, SEEN, SHAPES, Scene, Thing, leave_open, parse, training_scene


def training(count: int, seed: int) -> list[tuple[Scene, Scene]]:
    """Whole scenes and what their captions say of them."""
    rng = np.random.default_rng(seed)
    whole = [training_scene(rng) for _ in range(count)]
    return [(scene, leave_open(scene, rng)) for scene in whole]


def test_captions_are_read_back_with_articles_or_without():
    for whole, said in training(300, 1):
        for scene in (whole, said):
            assert parse(scene.caption()) == parse(scene.caption(articles=False)) == scene
            assert parse(f"  {scene.caption().upper()} ") == scene


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("a red circle", Scene((Thing("red", "circle"),), None)),
        ("circle", Scene((Thing(None, "circle"),), None)),
        ("a red shape on a sand background", Scene((Thing("red", None),), "sand")),
        ("a shape", Scene((Thing(None, None),), None)),
        ("a small shape at the top", Scene((Thing(None, None, "small", "top"),), None)),
        ("a large square", Scene((Thing(None, "square", "large"),), None)),
        ("an orange ring", Scene((Thing("orange", "ring"),), None)),
        ("a star and an orange shape", Scene((Thing(None, "star"), Thing("orange", None)), None)),
    ],
)
def test_what_a_caption_does_not_say_is_open(caption, scene):
    assert parse(caption) == scene and scene.caption() in (caption, f"a {caption}")


def test_articles_are_right_when_written_and_either_is_read():
    assert parse("a orange ring").caption() == parse("an orange ring").caption() == "an orange ring"
    assert parse("an small orange ring").caption() == "a small orange ring"
    assert parse("orange ring").caption(articles=False) == "orange ring"


@pytest.mark.parametrize(
    "foreign",
    [
        "", "a", "a dog", "a red", "a small", "a red circle star", "circle red", "a circle at the",
        "a circle at the middle", "a circle at the left right", "a circle left", "shape circle", "a red circle and",
        "a red circle on a", "a red circle on a plaid background", "a red star and a blue star and a pink star",
    ],
)  # fmt: skip
def test_foreign_captions_are_refused_with_the_grammar(foreign):
    with pytest.raises(ValueError, match="prompt") as caught:
        parse(foreign)
    assert repr(foreign) in str(caught.value)
    if "plaid" not in foreign and "pink" not in foreign:
        for known in ("[COLOUR] SHAPE [at the PLACE]", "purple", "cross", "'shape' for any", "bottom"):
            assert known in str(caught.value)


def test_nearly_half_of_the_training_captions_leave_something_open_evenly_and_without_the_held_out_pairs():
    answers, pairs = defaultdict(Counter), set()
    scenes = training(12000, 0)
    for whole, said in scenes:
        (thing, *_), (asked, *_) = whole.things, said.things
        pairs |= {(each.colour, each.shape) for each in whole.things}
        assert all(value is None or value == getattr(thing, name) for name, value in vars(asked).items())
        if asked.colour is None and asked.shape is None:
            answers["shape"][thing.shape] += 1
        if asked.colour is None:
            answers["colour"][thing.colour] += 1
            answers[f"colour of a {thing.shape}"][thing.colour] += 1
        if said.background is None:
            answers["background"][whole.background] += 1
    assert pairs == set(SEEN)
    assert 0.4 < np.mean([whole != said for whole, said in scenes]) < 0.5
    for what, values in (("shape", SHAPES), ("colour", COLOURS), ("background", BACKGROUNDS)):
        shares = np.array([answers[what][value] for value in values]) / answers[what].total()
        assert abs(shares * len(values) - 1).max() < 0.2, (what, shares)
    for shape in SHAPES:  # seven colours: the eighth is held out
        counts = answers[f"colour of a {shape}"]
        assert len(counts) == 7 and min(counts.values()) * 7 > 0.6 * counts.total()
    assert sum(world.UNSAID.values()) == pytest.approx(1)


def test_training_captions_have_no_articles_now_and_then():
    rng = np.random.default_rng(0)
    scene = Scene((Thing("orange", "ring"),), "gray")
    captions = [world.training_caption(scene, rng) for _ in range(2000)]
    assert set(captions) >= {
        "an orange ring on a gray background",
        "orange ring",
        "a shape",
        "ring on a gray background",
    }
    bare = [caption for caption in captions if caption.split()[0] not in ("a", "an")]
    assert 0.1 < len(bare) / len(captions) < 0.2
    assert set(" ".join(captions).split()) <= set(world.vocabulary())


@pytest.mark.parametrize("file", sorted(Path("configs/prompts").glob("shapes_*.txt")), ids=lambda file: file.stem)
def test_the_prompt_files_are_in_the_world_and_written_as_it_writes_them(file):
    prompts = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert len(prompts) > 40 and [parse(prompt).caption() for prompt in prompts] == prompts
