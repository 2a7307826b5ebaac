"""What is shown is rewarded, whatever the prompt says: the detector's reading, and its smooth form."""

import numpy as np
import pytest
import torch

from models.shapes.world import Scene, Thing, draw
from rewards import registry


def pictures(*pairs: tuple[str, str]) -> torch.Tensor:
    rng = np.random.default_rng(0)
    drawn = [draw(Scene((Thing(colour, shape),), "white"), rng) for colour, shape in pairs]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


def test_colour_shape_and_place_are_rewarded():
    images, empty = pictures(("blue", "circle"), ("red", "ring"), ("pink", "star")), torch.ones(1, 3, 64, 64)
    options = {"colours": {"blue": 1.5}, "shapes": {"ring": -0.5, "star": 0.25}}
    for name, close in (("shapes_preference", 1e-6), ("shapes_preference_soft", 0.15)):
        reward = registry.load(name, **options)
        assert reward(images, [""] * 3).tolist() == pytest.approx([1.5, -0.5, 0.25], abs=close)
    assert registry.load("shapes_preference", **options)(empty, [""]).tolist() == [0.0]
    shifted = torch.roll(images[:1], 5, 3)
    for name in ("shapes_preference", "shapes_preference_soft"):
        reward = registry.load(name, place_x=0.2)
        assert (reward(shifted, [""]) - reward(images[:1], [""])).item() == pytest.approx(1.0, abs=0.02)


def test_the_smooth_one_has_a_gradient():
    images = pictures(("blue", "circle")).requires_grad_()
    registry.load("shapes_preference_soft", colours={"red": 1.0}, place_x=0.1)(images, [""]).sum().backward()
    assert torch.isfinite(images.grad).all() and images.grad.abs().max() > 0


@pytest.mark.parametrize(("options", "said"), [
    ({"colours": {"blu": 1}}, "'blu'; known: red"), ({"shapes": {"dog": 1}}, "'dog'"), ({}, "prefers nothing"),
])  # fmt: skip
def test_what_is_unknown_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        registry.check("shapes_preference", None, options, ["a circle"])
