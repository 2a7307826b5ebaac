"""Diversity and drift of known sets, and intervals that hold the truth as often as they say."""

import numpy as np
import pytest

from evaluation import metrics

RNG = np.random.default_rng(0)


def distance(features) -> float:
    return metrics.mean_of_good(metrics.prompt_distances(features, ["the same"] * len(features)))


def test_vendi_counts_different_pictures_by_the_papers_formula():
    for pictures, count in ((np.ones((6, 4)), 1), (np.eye(6), 6), (np.repeat(np.eye(3), 4, 0), 3)):
        assert metrics.vendi(pictures) == pytest.approx(count)
    features = RNG.normal(size=(7, 5))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / 7)
    values = values[values > 1e-12]
    assert metrics.vendi(features) == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-9)


def test_distances_are_to_the_others_of_the_prompt():
    pictures = RNG.normal(size=(5, 3))
    unit = pictures / np.linalg.norm(pictures, axis=1, keepdims=True)
    pairs = [1 - unit[i] @ unit[j] for i in range(5) for j in range(5) if i != j]
    assert distance(pictures) == pytest.approx(np.mean(pairs), rel=1e-9)
    features, prompts = np.array([[1.0, 0], [0, 2.0], [1.0, 0], [3.0, 0], [1.0, 0]]), ["a", "a", "b", "b", "c"]
    distances = metrics.prompt_distances(features, prompts)
    np.testing.assert_allclose(distances[:4], [1, 1, 0, 0], atol=1e-12)
    assert np.isnan(distances[4])
    alone = metrics.prompt_distances(features[:3], ["a", "b", "c"])  # no prompt has two: all others
    np.testing.assert_allclose(alone, [0.5, 1, 0.5], atol=1e-12)


def test_frechet_distance_is_that_of_the_sets_moments():
    """Against the formula, with a matrix root made here; of more pictures than features, and of fewer."""
    for n, size in ((400, 3), (6, 10)):
        a, b = RNG.normal(size=(n, size)), RNG.normal(size=(n + 1, size)) * np.linspace(0.5, 2, size) + 1
        cov_a, cov_b = np.cov(a.T), np.cov(b.T)
        values, vectors = np.linalg.eigh(cov_a)
        root = vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T
        middle = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * middle
        assert metrics.fid(a, b) == pytest.approx(expected, rel=1e-6)
        assert metrics.fid(a, a) == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_the_unbiased_one():
    a, b = RNG.normal(size=(12, 4)), RNG.normal(size=(10, 4)) + 0.5

    def mean(x, y, *without):
        pairs = [(p @ q / 4 + 1) ** 3 for i, p in enumerate(x) for j, q in enumerate(y) if not without or i != j]
        return np.mean(pairs)

    assert metrics.kid(a, b) == pytest.approx(mean(a, a, "itself") + mean(b, b, "itself") - 2 * mean(a, b), rel=1e-9)


def test_bad_pictures_are_left_out():
    features, reference = RNG.normal(size=(20, 4)), RNG.normal(size=(20, 4))
    torn = np.concatenate([features, np.full((3, 4), np.nan)])
    for statistic in (metrics.vendi, distance):
        assert statistic(torn) == pytest.approx(statistic(features))
    for statistic in (metrics.fid, metrics.kid):
        assert statistic(torn, reference) == statistic(features, reference)
    assert np.isnan(distance(features[:1])) and np.isnan(metrics.vendi(features[:0]))
    assert np.isnan(metrics.fid(features[:1], reference)) and np.isnan(metrics.kid(features, reference[:1]))


def test_half_sampled_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, truth = np.random.default_rng(1), 1 - 1 / 8  # two draws of eight kinds differ so often
    intervals = [metrics.half_interval(distance, np.eye(8)[rng.integers(0, 8, 80)]) for _ in range(60)]
    assert sum(low <= truth <= high for low, high in intervals) >= 50


@pytest.mark.parametrize(
    ("draw", "mean", "size"), [("normal", 0, 150), pytest.param("exponential", 1, 500, marks=pytest.mark.long)]
)
def test_bootstrap_intervals_hold_the_mean_as_often_as_they_say(draw, mean, size, monkeypatch):
    """95 % intervals of 1,000 samples: the share that holds the mean has a standard error of 0.7 %."""
    monkeypatch.setattr(metrics, "RESAMPLES", 500)
    rng = np.random.default_rng(2)
    intervals = [metrics.mean_interval(getattr(rng, draw)(size=size)) for _ in range(1_000)]
    assert 0.93 <= np.mean([low <= mean <= high for low, high in intervals]) <= 0.97


def test_a_bootstrap_interval_is_the_percentiles_of_resampled_means():
    """Against a resampler made here: quantiles of 10,000 resamples differ by about 0.02 standard errors."""
    values = np.append(RNG.exponential(size=80), np.nan)
    good = values[:-1]
    means = good[np.random.default_rng(5).integers(0, 80, (10_000, 80))].mean(1)
    standard_error = good.std() / np.sqrt(80)
    quantiles = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose(metrics.mean_interval(values), quantiles, rtol=0, atol=0.1 * standard_error)
    assert metrics.mean_interval(np.array([3.0, np.nan])) == (3, 3)
    assert np.isnan(metrics.mean_interval(np.array([np.nan]))).all()


def test_a_paired_interval_holds_the_true_shift_and_uses_the_pairing():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 10, 200)
    after = before + 0.5 + rng.normal(0, 0.1, 200)
    low, high = metrics.paired_interval(before, after)
    assert 0.45 < low < 0.5 < high < 0.55
    low, high = metrics.paired_interval(rng.normal(size=100), rng.normal(size=100))  # no shift
    assert low < 0 < high


def test_intervals_are_the_same_every_time_and_around_the_value():
    features, state = RNG.normal(size=(40, 5)), np.random.get_state()[1].copy()
    interval = metrics.half_interval(metrics.vendi, features)
    assert interval == metrics.half_interval(metrics.vendi, features)
    assert interval[0] < metrics.vendi(features) < interval[1]
    assert metrics.mean_interval(features[:, 0]) == metrics.mean_interval(features[:, 0])
    assert (np.random.get_state()[1] == state).all()
    assert np.isnan(metrics.half_interval(metrics.vendi, features[:3])).all()
