"""The scorer's layout and refusals."""

import functools
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from brightness import VALUES, Brightness, clean, latents, scorer
from PIL import Image

from diffusion.gpu_memory import OutOfMemory
from diffusion.trajectory import Chunk, CleanPredictions
from rewards import registry
from rewards.scorer import BadReward, Scorer, usual_batch


def test_scorer_lays_rewards_out_by_trajectory_and_state():
    scores = scorer().score(clean())
    np.testing.assert_allclose(scores.rewards, np.array([[0.1, 0.2, 0.3], [0.4, np.nan, 0.5]], np.float32), rtol=1e-6)
    assert scores.images is None
    for batch in (1, 2, 3):  # every state has its own reward in any
        np.testing.assert_array_equal(scorer(batch=batch).score(clean()).rewards, scores.rewards)


def four(bad=None) -> CleanPredictions:
    """Four trajectories of two steps; the latent `bad` is no number."""
    made = latents(np.linspace(0.1, 0.9, 12))
    made[[] if bad is None else bad] = np.nan
    chunk = Chunk(0, "train", 4, 0, ("p",) * 4, (0, 1, 2, 3))
    return CleanPredictions(chunk, 2, made, np.repeat(np.arange(4), 3), np.tile(np.arange(3), 4), 2)


def test_shuffled_rewards_are_a_permutation_of_whole_good_trajectories():
    for bad, good in ((None, [0, 1, 2, 3]), (4, [0, 2, 3])):
        plain, mixed = (scorer(quarantine=True, shuffle=mix).score(four(bad)).rewards for mix in (False, True))
        assert np.isnan(mixed[1]).all() == (1 not in good) and (mixed[good] != plain[good]).all()
        assert {tuple(row) for row in mixed[good]} == {tuple(row) for row in plain[good]}


def test_parts_of_a_sum_go_where_its_shuffled_reward_goes():
    reward = registry.load("weighted_sum", terms=[{"name": "brightness:Brightness", "weight": 2}])
    scores = scorer(reward, quarantine=True, shuffle=True).score(four(bad=4))
    assert len({*scores.rewards[[0, 2, 3], -1]}) == 3
    np.testing.assert_allclose(2 * scores.parts["brightness:Brightness"], scores.rewards[:, -1], rtol=1e-6)


@pytest.mark.parametrize(("gradients", "sizes"), [(False, (32, 32, 16, 4, 1, 1)), (True, (16, 16, 4, 1, 1, 1))])
def test_where_no_gpu_says_images_at_once_go_by_their_pixels(gradients, sizes):
    """And are those of before at 64 pixels: rewards depend on them in their last bits."""
    for side, size in zip((32, 64, 256, 512, 1024, 2048), sizes, strict=True):
        assert usual_batch(side**2, gradients) == size
    sides, seen = (4, 256), list[int]()

    def decode(made):
        seen.append(len(made))
        return made[:, :3].expand(-1, 3, -1, -1)

    decode.magnification = 2
    for side in sides:
        scorer_, given = scorer(), four()
        scorer_.decoder = decode
        scorer_.score(replace(given, latents=np.resize(given.latents, (12, *given.latents.shape[1:2], side, side))))
        assert scorer_.fitting_batch((4, side, side), "p", "cpu") == {4: 32, 256: 4}[side]
    assert seen == [12, 4, 4, 4]


def raises_on(above) -> Brightness:

    def check(scores):
        if (scores > above).any():
            raise KeyError("too bright")
        return scores

    return Brightness(check)


def test_a_bad_reward_is_named_with_its_prompts():
    with pytest.raises(BadReward, match=r"brightness failed .*'first' to 'second': KeyError: 'too bright'"):
        scorer(raises_on(0)).score(clean())
    with pytest.raises(BadReward, match=r"'second', trajectory 11 of epoch 4, state 2"):
        scorer().score(clean([0.1, 0.2, 0.3, 0.4, float("nan")]))
    said = "all 2 trajectories of chunk 0 of epoch 4 are bad: reward brightness is broken"
    with pytest.raises(BadReward, match=said):
        scorer(raises_on(0), quarantine=True).score(clean())
    nan = Brightness(lambda scores: scores * float("nan"))
    nan.name = "that failed on me"  # whatever it is called: it returned, and may be right in the next chunk
    with pytest.raises(BadReward, match="epoch 4 are bad; the first: reward that failed on me returned nan"):
        scorer(nan, quarantine=True).score(clean())


def brightnesses(thumbnails) -> list[float]:
    return [np.asarray(Image.open(io.BytesIO(file))).mean().round() for file in thumbnails]


def test_thumbnails_are_small_pictures_of_the_images_of_training():
    scores = scorer(thumbnail_pixels=8).score(clean())
    assert [Image.open(io.BytesIO(file)).size for file in scores.thumbnails] == [(8, 8)] * 2
    assert brightnesses(scores.thumbnails) == [76, 128]  # .3 and .5 of 255, in their order
    assert scores.verdict(1.5).rewards == (pytest.approx(0.3), 0.5) and scores.verdict(1.5).seconds == 1.5


def test_a_tiny_decoder_serves_inner_states_and_never_the_end():
    tiny = functools.partial(torch.full_like, fill_value=0.9)
    scores = scorer(tiny=tiny, thumbnail_pixels=4).score(clean())
    np.testing.assert_allclose(scores.rewards, np.array([[0.9, 0.9, 0.3], [0.9, np.nan, 0.5]], np.float32), rtol=1e-6)
    assert brightnesses(scores.thumbnails) == [76, 128]
    skipping = scorer(tiny=tiny).score(replace(clean(), terminal=1))
    np.testing.assert_allclose(skipping.rewards, np.array([[0.9, 0.2, 0.3], [0.9, np.nan, 0.5]], np.float32), rtol=1e-6)


@pytest.mark.parametrize("where", ["reward", "gradient"])
def test_a_gpu_that_is_too_small_is_no_bad_reward(where):
    """Memory peaks in decoder and reward, and in the way back: the message names the setting."""

    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(context, scores):
            if where == "reward":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return scores.clone()

        @staticmethod
        def backward(context, gradient):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemory, match=r"reward\.batch=4 does not fit into GPU memory; make it smaller"):
        scorer(Brightness(Greedy.apply, differentiable=True), gradients=True, batch=4).score(clean())


NOT_A_NUMBER = Brightness(lambda scores: torch.where(scores > 0.45, torch.inf, scores))
BAD_GRADIENT = Brightness(lambda scores: scores + 0 * (0.5 - scores).sqrt(), differentiable=True)  # at 0.5


@pytest.mark.parametrize(
    ("values", "reward", "reason"),
    [
        ([0.1, 0.2, 0.3, 0.4, float("nan")], Brightness(), "latents that are not finite, state 2"),
        ([0.1, 0.2, 0.3, float("inf"), 0.5], Brightness(), "latents that are not finite, state 0"),
        ([0.1, 0.2, 0.3, 0.4, 0.001], Brightness(), "an all-black image"),
        (VALUES, NOT_A_NUMBER, "reward brightness returned inf, state 2"),
        (VALUES, raises_on(0.45), "failed on 1 images with prompts from 'second'"),
        (VALUES, BAD_GRADIENT, "the gradient of reward brightness is not finite"),
    ],
)
def test_every_kind_of_bad_trajectory_is_set_aside_or_stops(values, reward, reason):
    gradients = reward.differentiable
    scores = scorer(reward, quarantine=True, thumbnail_pixels=4, gradients=gradients).score(clean(values))
    assert list(scores.bad) == [1] and reason in scores.bad[1] and np.isnan(scores.rewards[1]).all()
    np.testing.assert_allclose(scores.rewards[0], [0.1, 0.2, 0.3], rtol=1e-6)
    assert scores.good_ids == (10,) and len(scores.thumbnails) == 2
    assert (1 in scores.bad_images) == ("latents" not in reason)
    assert scores.verdict(1.0).bad == scores.bad
    if gradients:
        assert (scores.gradient_row[1] == -1).all() and np.isfinite(scores.gradients[scores.gradient_row[0]]).all()
    with pytest.raises(BadReward, match=r"reward\.on_bad_reward=quarantine"):
        scorer(reward, gradients=gradients).score(clean(values))


def test_a_decoder_that_makes_no_numbers_is_found_and_a_black_image_only_at_the_end():
    scores = Scorer(lambda x: torch.where(x > 0.45, torch.nan, x), Brightness(), quarantine=True).score(clean())
    assert scores.bad == {1: "an image that is not finite, state 2"} and not scores.bad_images
    assert scorer(quarantine=True).score(clean([0.0, 0.0, 0.3, 0.0, 0.5])).bad == {}
    black = clean([0.1, 0.2, 0.3, 0.4, 0.0])
    assert scorer(quarantine=True, allow_black=True).score(black).bad == {}
    with pytest.raises(BadReward, match=r"reward\.black_images=allow where black may be right"):
        scorer().score(black)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_reward_that_raises_on_some_leaves_the_others_scores(batch):
    """Scored alone they are what they are in a batch; the batches before and after go on."""
    scores = scorer(raises_on(0.25), quarantine=True, batch=batch).score(clean([0.1, 0.2, 0.3, 0.15, 0.05]))
    assert list(scores.bad) == [0]
    np.testing.assert_allclose(scores.rewards[1], [0.15, np.nan, 0.05], rtol=1e-6)
