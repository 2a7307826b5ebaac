"""Diversity and drift of known sets."""

import numpy as np
import pytest

from evaluation import metrics

RNG = np.random.default_rng(0)


def test_vendi_counts_different_pictures():
    same, apart = np.ones((6, 4)), np.eye(6)
    assert metrics.vendi(same) == pytest.approx(1)
    assert metrics.vendi(apart) == pytest.approx(6)
    assert metrics.vendi(np.repeat(np.eye(3), 4, 0)) == pytest.approx(3)


def test_vendi_is_the_papers_formula():
    features = RNG.normal(size=(7, 5))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / 7)
    values = values[values > 1e-12]
    assert metrics.vendi(features) == pytest.approx(np.exp(-(values * np.log(values)).sum()), rel=1e-9)


def test_distance_is_the_mean_over_pairs():
    features = RNG.normal(size=(5, 3))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    pairs = [1 - unit[i] @ unit[j] for i in range(5) for j in range(5) if i != j]
    assert metrics.distance(features) == pytest.approx(np.mean(pairs), rel=1e-9)


def test_frechet_distance_of_gaussians_is_that_of_their_moments():
    """Against the formula, with the matrix root of its own making."""
    a, b = RNG.normal(size=(400, 3)), RNG.normal(size=(400, 3)) @ np.diag([1.0, 2.0, 0.5]) + [1.0, 0.0, -1.0]
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    middle = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * middle
    assert metrics.fid(a, b) == pytest.approx(expected, rel=1e-3)
    assert metrics.fid(a, a) == pytest.approx(0, abs=1e-4)


def test_kernel_distance_is_the_unbiased_one():
    a, b = RNG.normal(size=(30, 4)), RNG.normal(size=(30, 4)) + 0.5

    def kernel(x, y):
        return (x @ y.T / 4 + 1) ** 3

    def off_diagonal(k):
        return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))

    expected = off_diagonal(kernel(a, a)) + off_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean()
    assert metrics.kid(a, b) == pytest.approx(expected, rel=1e-3)


def test_drift_is_told_from_noise():
    base, same, moved = (RNG.normal(size=(200, 6)) + shift for shift in (0, 0, 0.7))
    for statistic in (metrics.fid, metrics.kid):
        assert statistic(moved, base) > 5 * abs(statistic(same, base))


def test_bad_pictures_are_left_out():
    features, reference = RNG.normal(size=(20, 4)), RNG.normal(size=(20, 4))
    torn = np.concatenate([features, np.full((3, 4), np.nan)])
    for statistic in (metrics.vendi, metrics.distance):
        assert statistic(torn) == pytest.approx(statistic(features))
    for statistic in (metrics.fid, metrics.kid):
        assert statistic(torn, reference) == pytest.approx(statistic(features, reference), rel=1e-5)
    assert np.isnan(metrics.distance(features[:1])) and np.isnan(metrics.vendi(features[:0]))
    assert np.isnan(metrics.fid(features[:1], reference)) and np.isnan(metrics.kid(features, reference[:1]))


def test_a_statistic_per_prompt_sees_each_prompts_own():
    features = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(metrics.mean_per_prompt(metrics.vendi, ["a", "a", "b", "b"], features), [2, 1])
    np.testing.assert_allclose(metrics.mean_per_prompt(metrics.vendi, ["a", "b", "a", "b"], features), [1, 2])


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Half-sampling, of a statistic whose spread is known: 95 % intervals of the distance of one-hot features, and
    bootstraps of a mean."""
    rng, half, whole = np.random.default_rng(1), 0, 0
    truth = 1 - 1 / 8  # two draws of eight kinds differ so often
    for _ in range(60):
        kinds = rng.integers(0, 8, 80)
        low, high = metrics.half_interval(metrics.distance, np.eye(8)[kinds])
        half += low <= truth <= high
        values = rng.normal(size=60)
        low, high = metrics.mean_interval(values, draws=500)
        whole += low <= 0 <= high
    assert half >= 50 and whole >= 50


def test_intervals_are_the_same_every_time_and_around_the_value():
    features = RNG.normal(size=(40, 5))
    state = np.random.get_state()[1].copy()
    found = metrics.half_interval(metrics.vendi, features)
    assert found == metrics.half_interval(metrics.vendi, features)
    assert found[0] < metrics.vendi(features) < found[1]
    assert (np.random.get_state()[1] == state).all()
    assert np.isnan(metrics.half_interval(metrics.vendi, features[:3])).all()
