"""Parts of a sum as they are trained on, and their shares of its variance, by hand."""

import math

import numpy as np
import pytest

from rewards.mixture import Mixture, is_flat, shares

PROMPTS = ["cat", "cat", "dog", "dog"]
PARTS = {"x": [1.0, 3.0, 10.0, 20.0], "y": [5.0, 5.0, 4.0, 8.0]}
WEIGHTS = {"x": 2.0, "y": -1.0}
DEVIATION = math.sqrt(55.25)  # of x: the squares 56.25, 30.25, 2.25 and 132.25 about the mean 8.5
BY_HAND = {
    "none": {"x": [2, 6, 20, 40], "y": [-5, -5, -4, -8]},
    "prompt": {"x": [-2, 2, -2, 2], "y": [0, 0, 1, -1]},  # y tells no cat from the other
    "epoch": {
        "x": [2 * far / DEVIATION for far in (-7.5, -5.5, 1.5, 11.5)],
        "y": [-far / 1.5 for far in (-0.5, -0.5, -1.5, 2.5)],  # the squares sum to 9, a mean of 2.25
    },
}


@pytest.mark.parametrize("normalise", BY_HAND)
def test_each_part_is_standardised_within_the_prompt_or_the_epoch_and_then_weighted(normalise):
    made = Mixture(WEIGHTS, normalise).contributions(PROMPTS, PARTS)
    assert list(made) == ["x", "y"]
    for label, values in made.items():
        np.testing.assert_allclose(values, BY_HAND[normalise][label], rtol=1e-12)


@pytest.mark.parametrize("normalise", ["prompt", "epoch"])
def test_another_scale_or_offset_of_a_part_changes_nothing(normalise):
    mixture = Mixture(WEIGHTS, normalise)
    other = {"x": [1000 * value - 3 for value in PARTS["x"]], "y": [value / 100 for value in PARTS["y"]]}
    for label, values in mixture.contributions(PROMPTS, other).items():
        np.testing.assert_allclose(values, BY_HAND[normalise][label], rtol=1e-9, atol=1e-12)


def test_rounding_errors_are_no_spread():
    noisy = {"x": [0.3, 0.3 + 1e-6, 0.3, 0.3 - 1e-6], "y": [1.0, 1.0001, 1.0, 1.0001]}
    made = Mixture(WEIGHTS, "epoch").contributions(PROMPTS, noisy)
    assert made["x"].tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(made["y"], [1, -1, 1, -1], rtol=1e-9)
    assert is_flat(np.zeros(3)) and is_flat(np.array([7.0])) and not is_flat(np.array([-1e-9, 1e-9]))


def test_a_part_is_named_where_it_tells_no_pictures_apart():
    by_prompt = {"x": [1.0, 1.0, 2.0, 2.0], "y": [3.0, 3.0, 3.0, 3.0]}  # x tells the prompts apart, and no pictures
    expected = {"none": ["y"], "epoch": ["y"], "prompt": ["x", "y"]}
    assert {how: Mixture(WEIGHTS, how).without_spread(PROMPTS, by_prompt) for how in expected} == expected
    assert Mixture(WEIGHTS, "prompt").without_spread(PROMPTS, PARTS) == []


def test_a_share_is_the_covariance_with_the_sum_over_its_variance():
    """Of the sums -2, 2, -1 and 1, whose variance is 2.5, the covariances are 3 and -0.5."""
    found = shares({label: np.array(values, float) for label, values in BY_HAND["prompt"].items()})
    assert found == pytest.approx({"x": 1.2, "y": -0.2})
    # Unrelated parts of equal spread and weight halve it; parts that cancel leave none to share.
    up, down = np.array([1.0, -1.0, 1.0, -1.0]), np.array([1.0, 1.0, -1.0, -1.0])
    assert shares({"a": up, "b": down}) == pytest.approx({"a": 0.5, "b": 0.5})
    assert shares({"a": up, "b": 100 * down}) == pytest.approx({"a": 1 / 10001, "b": 10000 / 10001})
    assert shares({"a": up, "b": -up}) == {"a": None, "b": None}


def test_one_that_takes_a_bad_ones_place_counts_once():
    mixture, rows = Mixture(WEIGHTS, "epoch"), list(zip(*PARTS.values(), strict=True))
    sums = np.sum(list(mixture.contributions(PROMPTS, PARTS).values()), 0)
    ids, places = [4, 6, 6, 5, 7, 6], [0, 2, 2, 1, 3, 2]
    made = mixture.trained(ids, [PROMPTS[i] for i in places], [rows[i] for i in places])
    np.testing.assert_allclose(made, sums[places], rtol=1e-12)


def test_what_is_a_sum_of_rewards_and_how_is_read_from_the_options():
    terms = [{"name": "jpeg_compressibility", "weight": 2}, {"name": "jpeg_compressibility", "weight": -0.5}]
    made = Mixture.of("weighted_sum", {"terms": terms, "normalise": "prompt"})
    assert made == Mixture({"jpeg_compressibility": 2.0, "jpeg_compressibility_2": -0.5}, "prompt")
    assert Mixture.of("weighted_sum", {"terms": terms}).normalise == "none"
    assert Mixture.of("jpeg_compressibility", {}) is None
