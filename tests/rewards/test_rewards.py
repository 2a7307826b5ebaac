"""Rewards by name, a user's own, and the scorer's layout and refusals."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.gpu_memory import OutOfMemory
from diffusion.trajectory import Chunk, CleanPredictions
from models.shapes.world import Scene, Thing, draw
from rewards import registry
from rewards.scorer import BadReward, Scorer


def as_images(*pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize(("name", "sign"), [("jpeg_incompressibility", 1), ("jpeg_compressibility", -1)])
def test_jpeg_reward_is_the_file_size_in_kilobytes(name, sign):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (64, 48, 3)).astype(np.uint8), np.zeros((64, 48, 3), np.uint8)]
    reward = registry.load(name)
    scores = reward(as_images(*pictures), ["", ""])
    for picture, score in zip(pictures, scores, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=95)
        assert score.item() == pytest.approx(sign * len(buffer.getvalue()) / 1000)
    assert reward.name == name and not reward.differentiable and scores.dtype == torch.float32


def test_alignment_prefers_what_the_prompt_says():
    rng = np.random.default_rng(0)
    reward = registry.load("shapes_alignment")
    picture = draw(Scene((Thing("red", "circle", "small"),), "white"), rng)
    prompts = [
        "a small red circle on a white background",
        "a small red circle on a black background",
        "a small blue circle on a white background",
        "a small red star on a white background",
        "a large red circle on a white background",
    ]
    right, *wrong = reward(as_images(*[picture] * 5), prompts).tolist()
    assert right > 0.8
    assert max(wrong) < right - 0.1


def test_alignment_is_graded_near_the_top_and_reads_two_objects():
    rng = np.random.default_rng(0)
    reward = registry.load("shapes_alignment")
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "sand")
    picture = draw(scene, rng)
    blurred = np.asarray(Image.fromarray(picture).resize((12, 12)).resize((64, 64)))
    swapped = draw(Scene(scene.things[::-1], "sand"), rng)
    best, worse, wrong = reward(as_images(picture, blurred, swapped), [scene.caption()] * 3).tolist()
    assert 1 > best > worse > wrong


def test_a_foreign_prompt_is_named():
    with pytest.raises(ValueError, match="a dog"):
        registry.load("shapes_alignment")(torch.zeros(1, 3, 64, 64), ["a dog"])


def test_unknown_names_options_and_weights_are_refused():
    with pytest.raises(registry.UnknownReward, match="jpeg_compressibility"):
        registry.load("beauty")
    with pytest.raises(registry.UnknownReward, match="no_such_module"):
        registry.load("no_such_module:f")
    with pytest.raises(ValueError, match="weights"):
        registry.load("jpeg_compressibility", weights="x")
    with pytest.raises(ValueError, match="jpeg"):
        registry.load("jpeg_compressibility", colour=3)


def test_a_users_own_reward(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(
        "def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n"
        "class Scaled:\n    differentiable = True\n"
        "    def __init__(self, by):\n        self.by = by\n"
        "    def __call__(self, images, prompts):\n        return self.by * images.mean((1, 2, 3))\n"
        "def wrong(images, prompts):\n    return 0.0\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    images = torch.full((2, 3, 4, 4), 0.5)
    assert registry.load("my_reward:brightness")(images, ["", ""]).tolist() == [0.5, 0.5]
    scaled = registry.load("my_reward:Scaled", by=4)
    assert scaled.differentiable and scaled(images, ["", ""]).tolist() == [2, 2]
    with pytest.raises(ValueError, match="shape"):
        registry.load("my_reward:wrong")(images, ["", ""])
    with pytest.raises(registry.UnknownReward, match="expected a function"):
        registry.check("my_reward:number", None, {}, [])


class Brightness:
    name, differentiable = "brightness", False

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


def clean(values, purpose="train") -> CleanPredictions:
    """Two trajectories of two steps; the second's middle state is not scored."""
    latents = np.stack([np.full((3, 2, 2), value, np.float32) for value in values])
    chunk = Chunk(0, purpose, 4, 0, ("first", "second"), (10, 11))
    return CleanPredictions(chunk, 2, latents, np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 2]), 2)


def test_scorer_lays_rewards_out_by_trajectory_and_state():
    scores = Scorer(lambda latents: latents, Brightness()).score(clean([0.1, 0.2, 0.3, 0.4, 0.5]))
    expected = np.array([[0.1, 0.2, 0.3], [0.4, np.nan, 0.5]], np.float32)
    np.testing.assert_allclose(scores.rewards, expected, rtol=1e-6)
    assert scores.images is None


def test_shuffled_rewards_are_a_permutation_of_whole_trajectories_and_spare_evaluation():
    values = np.linspace(0.1, 0.9, 12).astype(np.float32)
    latents = np.stack([np.full((3, 2, 2), value, np.float32) for value in values])
    chunk = Chunk(0, "train", 4, 0, ("p",) * 4, (0, 1, 2, 3))
    made = CleanPredictions(chunk, 2, latents, np.repeat(np.arange(4), 3), np.tile(np.arange(3), 4), 2)
    plain = Scorer(lambda latents: latents, Brightness()).score(made).rewards
    shuffled = Scorer(lambda latents: latents, Brightness(), shuffle=True).score(made).rewards
    assert (shuffled != plain).any()
    np.testing.assert_array_equal(np.sort(shuffled[:, 0]), np.sort(plain[:, 0]))
    assert {tuple(row) for row in shuffled} == {tuple(row) for row in plain}


def test_a_reward_that_raises_is_named_with_its_prompts():
    class Broken(Brightness):
        def __call__(self, images, prompts):
            raise KeyError("no such key")

    with pytest.raises(BadReward, match=r"brightness failed .*'first' to 'second': KeyError"):
        Scorer(lambda latents: latents, Broken()).score(clean([0.1, 0.2, 0.3, 0.4, 0.5]))


def test_scorer_names_prompt_and_trajectory_of_a_bad_reward():
    with pytest.raises(BadReward, match=r"'second', trajectory 11 of epoch 4, state 2"):
        Scorer(lambda latents: latents, Brightness()).score(clean([0.1, 0.2, 0.3, 0.4, float("nan")]))


def test_thumbnails_are_small_pictures_of_the_images_of_training():
    def opened(file):
        return np.asarray(Image.open(io.BytesIO(file)))

    scorer = Scorer(lambda latents: latents, Brightness(), thumbnail_pixels=8)
    scores = scorer.score(clean([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert [opened(file).shape for file in scores.thumbnails] == [(8, 8, 3)] * 2
    assert [opened(file).mean().round() for file in scores.thumbnails] == [76, 128]  # .3 and .5 of 255, in their order
    assert scores.verdict(1.5).rewards == (pytest.approx(0.3), 0.5) and scores.verdict(1.5).seconds == 1.5
    assert Scorer(lambda latents: latents, Brightness()).score(clean([0.1, 0.2, 0.3, 0.4, 0.5])).thumbnails == ()


def test_a_tiny_decoder_serves_inner_states_and_never_the_end():
    def tiny(latents):
        return latents * 0 + 0.9

    made = clean([0.1, 0.2, 0.3, 0.4, 0.5])
    scores = Scorer(lambda latents: latents, Brightness(), tiny=tiny, thumbnail_pixels=4).score(made)
    np.testing.assert_allclose(scores.rewards, np.array([[0.9, 0.9, 0.3], [0.9, np.nan, 0.5]], np.float32), rtol=1e-6)
    brightness = [np.asarray(Image.open(io.BytesIO(file))).mean().round() for file in scores.thumbnails]
    assert brightness == [76, 128]
    skipping = Scorer(lambda latents: latents, Brightness(), tiny=tiny).score(replace(made, terminal=1))
    np.testing.assert_allclose(skipping.rewards, np.array([[0.9, 0.2, 0.3], [0.9, np.nan, 0.5]], np.float32), rtol=1e-6)


@pytest.mark.parametrize("where", ["reward", "gradient"])
def test_a_gpu_that_is_too_small_is_no_bad_reward(where):
    """Memory peaks in decoder and reward, and in the way back: the message names the setting."""

    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(context, images):
            if where == "reward":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return images.mean((1, 2, 3))

        @staticmethod
        def backward(context, gradient):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    class Large(Brightness):
        differentiable = True

        def __call__(self, images, prompts):
            return Greedy.apply(images)

    scorer = Scorer(lambda latents: latents, Large(), gradients=True, batch=4)
    with pytest.raises(OutOfMemory, match=r"reward\.batch=4 does not fit into GPU memory; make it smaller"):
        scorer.score(clean([0.1, 0.2, 0.3, 0.4, 0.5]))


@pytest.mark.parametrize("options", [{"name": "x"}, {"device": "cuda"}, {1: 2}, {"a b": 1}])
def test_options_that_no_reward_can_have_are_named(options):
    with pytest.raises(ValueError, match=r"reward\.options: .* cannot be an option"):
        registry.check("jpeg_compressibility", None, options, [])
    with pytest.raises(ValueError, match=r"terms\[0\]: reward\.options: .* cannot be an option"):
        terms = [{"name": "jpeg_compressibility", "weight": 1, "options": options}]
        registry.check("weighted_sum", None, {"terms": terms}, [])


def test_scoring_in_any_batch_gives_every_state_its_own_reward():
    made = clean([0.1, 0.2, 0.3, 0.4, 0.5])
    whole = Scorer(lambda latents: latents, Brightness()).score(made).rewards
    for batch in (1, 2, 3):
        np.testing.assert_array_equal(
            Scorer(lambda latents: latents, Brightness(), batch=batch).score(made).rewards, whole
        )


def quarantining(**more) -> Scorer:
    return Scorer(lambda latents: latents, more.pop("reward", Brightness()), quarantine=True, **more)


BAD_VALUES = [0.1, 0.2, 0.3, 0.4, 0.5]


class RaisesOn(Brightness):
    """On pictures brighter than `above`."""

    def __init__(self, above):
        self.above = above

    def __call__(self, images, prompts):
        scores = images.mean((1, 2, 3))
        if (scores > self.above).any():
            raise KeyError("too bright")
        return scores


class NotANumber(Brightness):
    def __call__(self, images, prompts):
        scores = images.mean((1, 2, 3))
        return torch.where(scores > 0.45, torch.inf, scores)


class BadGradient(Brightness):
    differentiable = True

    def __call__(self, images, prompts):
        scores = images.mean((1, 2, 3))
        return scores + 0 * (0.5 - scores).sqrt()  # at 0.5 the slope is 0 x infinity


@pytest.mark.parametrize(
    ("values", "more", "reason"),
    [
        ([0.1, 0.2, 0.3, 0.4, float("nan")], {}, "latents that are not finite, state 2"),
        ([0.1, 0.2, 0.3, float("inf"), 0.5], {}, "latents that are not finite, state 0"),
        ([0.1, 0.2, 0.3, 0.4, 0.001], {}, "an all-black image"),
        (BAD_VALUES, {"reward": NotANumber()}, "reward brightness returned inf, state 2"),
        (BAD_VALUES, {"reward": RaisesOn(0.45)}, "failed on 1 images with prompts from 'second'"),
        (BAD_VALUES, {"reward": BadGradient(), "gradients": True}, "the gradient of reward brightness is not finite"),
    ],
)
def test_every_kind_of_bad_trajectory_is_set_aside_or_stops(values, more, reason):
    scores = quarantining(thumbnail_pixels=4, **more).score(clean(values))
    assert list(scores.bad) == [1] and reason in scores.bad[1]
    assert np.isnan(scores.rewards[1]).all()
    np.testing.assert_allclose(scores.rewards[0], [0.1, 0.2, 0.3], rtol=1e-6)
    assert scores.good_ids == (10,) and len(scores.thumbnails) == 2
    assert (1 in scores.bad_images) == ("latents" not in reason)
    assert scores.verdict(1.0).bad == scores.bad
    if more.get("gradients"):
        assert (scores.gradient_row[1] == -1).all() and np.isfinite(scores.gradients[scores.gradient_row[0]]).all()
    with pytest.raises(BadReward, match=r"reward\.on_bad_reward=quarantine"):
        Scorer(lambda latents: latents, more.get("reward", Brightness()), gradients="gradients" in more).score(
            clean(values)
        )


def test_a_decoder_that_makes_no_numbers_is_found():
    def decoder(latents):
        return torch.where(latents > 0.45, torch.nan, latents)

    scores = Scorer(decoder, Brightness(), quarantine=True).score(clean(BAD_VALUES))
    assert scores.bad == {1: "an image that is not finite, state 2"} and not scores.bad_images


def test_a_black_image_counts_only_at_the_end_and_may_be_allowed():
    assert quarantining().score(clean([0.0, 0.0, 0.3, 0.0, 0.5])).bad == {}
    black = clean([0.1, 0.2, 0.3, 0.4, 0.0])
    assert quarantining(allow_black=True).score(black).bad == {}
    with pytest.raises(BadReward, match=r"reward\.black_images=allow where black may be right"):
        Scorer(lambda latents: latents, Brightness()).score(black)


def test_a_reward_that_raises_on_everything_is_broken():
    with pytest.raises(
        BadReward, match="all 2 trajectories of chunk 0 of epoch 4 are bad: reward brightness is broken"
    ):
        quarantining(reward=RaisesOn(0.0)).score(clean(BAD_VALUES))


def test_a_reward_that_raises_on_some_leaves_the_others_scores():
    """Scored alone they are what they are in a batch; the batches before and after go on."""
    for batch in (1, 2, 5):
        scores = quarantining(reward=RaisesOn(0.25), batch=batch).score(
            clean([0.1, 0.2, 0.3, 0.15, 0.05]),
        )
        assert list(scores.bad) == [0]
        np.testing.assert_allclose(scores.rewards[1], [0.15, np.nan, 0.05], rtol=1e-6)


def test_bad_rows_are_no_part_of_the_shuffle():
    values = np.linspace(0.1, 0.9, 12).astype(np.float32)
    latents = np.stack([np.full((3, 2, 2), value, np.float32) for value in values])
    latents[4] = np.nan
    chunk = Chunk(0, "train", 4, 0, ("p",) * 4, (0, 1, 2, 3))
    made = CleanPredictions(chunk, 2, latents, np.repeat(np.arange(4), 3), np.tile(np.arange(3), 4), 2)
    plain, mixed = (quarantining(shuffle=shuffle).score(made).rewards for shuffle in (False, True))
    assert np.isnan(mixed[1]).all()
    good = [0, 2, 3]
    assert (mixed[good] != plain[good]).all()
    np.testing.assert_array_equal(np.sort(mixed[good], 0), np.sort(plain[good], 0))
