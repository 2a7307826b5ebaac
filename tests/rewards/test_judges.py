"""Held-out rewards and features of evaluation images."""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from brightness import Brightness, clean, scorer
from tiny_models import write_aesthetic
from transformers import CLIPVisionModelWithProjection

from rewards import judges
from rewards.judges import Judges
from rewards.network import short_side
from rewards.scorer import BadReward
from rewards.weights import BadWeights, WeightsNotFound

PICTURES = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)


@pytest.fixture
def clip(tmp_path):
    return Path(write_aesthetic(tmp_path)["clip"])


def test_pixels_tell_place_and_colour_apart():
    scenes = torch.ones(4, 3, 64, 64)
    scenes[:2, 1:, 8:24, 8:24] = 0  # a red square at the left, twice
    scenes[2, 1:, 8:24, 40:56] = 0  # at the right
    scenes[3, :2, 8:24, 8:24] = 0  # blue
    found = torch.nn.functional.normalize(judges.pixels(scenes), dim=1)
    cosines = found @ found.T
    assert found.shape == (4, 195) and found.dtype == torch.float32
    assert cosines[0, 1] == pytest.approx(1) and cosines[0, 2] < 0.8 and cosines[0, 3] < 0.8


def test_clip_features_are_the_models_own_embedding(clip):
    images = torch.from_numpy(PICTURES).permute(0, 3, 1, 2).float() / 255
    model = CLIPVisionModelWithProjection.from_pretrained(clip)
    with torch.no_grad():
        expected = model(pixel_values=short_side(images, model.config.image_size)).image_embeds
    embedded = judges.load_features("clip", str(clip))(images)
    torch.testing.assert_close(embedded, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-5)


def test_features_that_cannot_be_had_are_named(clip, tmp_path):
    with pytest.raises(WeightsNotFound, match=r"evaluation\.clip"):
        judges.require_features("clip", str(tmp_path / "nowhere"))
    judges.require_features("pixels")
    (tmp_path / "config.json").write_text((clip / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(BadWeights):
        judges.load_features("clip", str(tmp_path))


def test_every_judge_sees_every_picture_in_batches():
    judge = Judges({"bright": Brightness()}, judges.pixels)
    whole = judge(PICTURES, ["a"] * 5, 5)
    parts = judge(PICTURES, ["a"] * 5, 2)
    np.testing.assert_allclose(whole[0]["bright"], PICTURES.mean((1, 2, 3)) / 255, rtol=1e-5)
    np.testing.assert_array_equal(whole[0]["bright"], parts[0]["bright"])
    np.testing.assert_array_equal(whole[1], parts[1])


def test_held_out_rewards_are_named_or_spelt_out():
    given = ["jpeg_compressibility", {"name": "jpeg_compressibility"}, {"name": "shapes_alignment", "options": {}}]
    assert judges.labels(given) == ["jpeg_compressibility", "jpeg_compressibility_2", "shapes_alignment"]
    assert list(judges.build(given, "pixels", None, "cpu").held_out) == judges.labels(given)
    assert judges.labels([]) == []
    for wrong, said in (
        ("beauty", r" \(beauty\): .*unknown reward 'beauty'"),
        ("shapes_alignment", r" \(shapes_alignment\)"),
        ({"name": "jpeg_compressibility", "weight": 2}, ": a held-out reward has no weight"),
        ({"reward": "jpeg_compressibility"}, r"\.name: Field required"),
    ):
        with pytest.raises(ValueError, match=rf"evaluation\.held_out\[0\]{said}"):
            judges.check([wrong], "pixels", None, ["a photo of a dog"])


def test_evaluation_images_alone_are_judged_further_and_bad_rows_are_not():
    judging = scorer(judges=Judges({"mine": Brightness()}, judges.pixels), quarantine=True)
    evaluated = judging.score(clean(purpose="evaluate"))
    np.testing.assert_allclose(evaluated.held_out["mine"], evaluated.rewards[:, -1], atol=2e-3)
    assert evaluated.features.shape == (2, 195)
    trained = judging.score(clean())
    assert trained.held_out == {} and trained.features is None
    scores = judging.score(clean([0.1, 0.2, 0.3, 0.4, np.nan], "evaluate"))
    assert list(scores.bad) == [1] and np.isnan(scores.features[1]).all() and np.isnan(scores.held_out["mine"][1])
    assert np.isfinite(scores.features[0]).all()
    with pytest.raises(BadReward, match=r"evaluation\.held_out: mine: RuntimeError: no such luck"):
        broken = Brightness(Mock(side_effect=RuntimeError("no such luck")))
        scorer(judges=Judges({"mine": broken}, judges.pixels)).score(clean(purpose="evaluate"))
