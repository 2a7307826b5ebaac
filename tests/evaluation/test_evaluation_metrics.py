"""Diversity and drift of known sets, and their intervals; how often these hold the truth: test_coverage.py."""

import itertools

import numpy as np
import pytest
from scipy import stats

from evaluation import metrics

RNG = np.random.default_rng(0)


def same(rows) -> list[str]:
    return ["the same"] * len(rows)


def distance(features) -> float:
    return metrics.distance(features, same(features))[0]


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
    assert metrics.distance(features, prompts)[0] == pytest.approx(0.5)  # of a 1, of b 0; c has no other
    assert np.isnan(metrics.distance(features[:3], ["a", "b", "c"])).all()  # not the distance over all pictures


def test_the_variance_of_a_distance_is_that_of_disjoint_pairs():
    """U^2 less the mean product of two pairs without a common picture, counted one by one."""
    features, prompts = RNG.normal(size=(11, 3)), ["a"] * 6 + ["b"] * 5
    variance, means = 0.0, []
    for rows in (features[:6], features[6:]):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        pairs = {pair: 1 - unit[pair[0]] @ unit[pair[1]] for pair in itertools.combinations(range(len(rows)), 2)}
        products = [p * q for one, p in pairs.items() for two, q in pairs.items() if not set(one) & set(two)]
        means.append(np.mean(list(pairs.values())))
        least = np.var(list(pairs.values())) / len(pairs)
        variance += (len(rows) / 11) ** 2 * max(means[-1] ** 2 - np.mean(products), least)
    value, low, high = metrics.distance(features, prompts)
    assert value == pytest.approx((6 * means[0] + 5 * means[1]) / 11)
    np.testing.assert_allclose([value - low, high - value], stats.t.ppf(0.975, 9) * variance**0.5, rtol=1e-9)


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


def test_an_interval_of_a_mean_is_students_within_prompts_and_wilsons_of_shares():
    prompts = [f"{i % 3}" for i in range(30)]
    values = np.tile([-1.0, 1.0], 15) + np.repeat([0, 50, 100], 10)[np.argsort(np.argsort(prompts, kind="stable"))]
    ordinary = stats.ttest_1samp(np.tile([-1.0, 1.0], 15), 0).confidence_interval()
    low, high = metrics.mean_interval(values, prompts)  # what prompts differ by is no noise
    assert high - low == pytest.approx(ordinary.high - ordinary.low, rel=0.05) and low + high == pytest.approx(100)
    assert metrics.mean_interval(np.zeros(256), same(range(256)))[1] == pytest.approx(0.01478, abs=1e-4)  # not [0, 0]
    skewed = np.random.default_rng(0).exponential(size=40)
    low, high = metrics.mean_interval(np.append(skewed, np.nan), same(range(41)))
    assert high - skewed.mean() > 1.1 * (skewed.mean() - low)  # the long tail may have been missed
    for few in ([], [3.0], [3.0, np.nan]):
        assert np.isnan(metrics.mean_interval(np.array(few), same(few))).all()
    assert np.isnan(metrics.paired_interval(np.ones(1), np.zeros(1), ["a"])).all()  # one picture proves nothing


def test_a_change_of_shares_is_no_point_where_nothing_changed_and_never_beyond_1():
    right = np.ones(32)
    low, high = metrics.paired_interval(right, right, same(right))
    assert low < 0 < high
    low, high = metrics.paired_interval(1 - right, right, same(right))
    assert 0.8 < low < high <= 1


def test_a_drifts_interval_is_one_that_the_distance_can_have():
    for shift in (0.0, 3.0):
        a, b = RNG.normal(size=(32, 40)) + shift, RNG.normal(size=(32, 40))
        low, high = metrics.drift_interval(metrics.fid, a, b, same(a))
        assert 0 < low < metrics.fid(a, b) < high
    assert metrics.drift_interval(metrics.fid, a, a, same(a)) == pytest.approx((0, 0), abs=1e-9)
    low, high = metrics.drift_interval(metrics.kid, a, b, same(a))
    assert low < metrics.kid(a, b) < high
    vendi = metrics.vendi_interval(np.ones((9, 4)), same(range(9)))
    assert vendi == pytest.approx((1, 1))


def test_a_floor_is_a_distribution_of_many_splits():
    rng = np.random.default_rng(0)
    drawn = [metrics.floor(metrics.fid, *rng.normal(size=(2, 40, 5)), same(range(40))) for _ in range(5)]
    singles = [metrics.fid(*rng.normal(size=(2, 40, 5))) for _ in range(200)]
    assert all(median < high for median, high in drawn)
    assert np.mean([high for _, high in drawn]) == pytest.approx(np.quantile(singles, 0.95), rel=0.2)


def test_a_paired_interval_holds_the_true_shift_and_uses_the_pairing():
    rng = np.random.default_rng(0)
    before = rng.normal(0, 10, 200)
    after = before + 0.5 + rng.normal(0, 0.1, 200)
    low, high = metrics.paired_interval(before, after, same(before))
    assert 0.45 < low < 0.5 < high < 0.55
    low, high = metrics.paired_interval(*rng.normal(size=(2, 100)), same(range(100)))  # no shift
    assert low < 0 < high


def test_intervals_are_the_same_every_time_and_around_the_value():
    features, other, state = *RNG.normal(size=(2, 40, 5)), np.random.get_state()[1].copy()
    prompts = [f"{i % 4}" for i in range(40)]
    interval = metrics.drift_interval(metrics.fid, features, other, prompts)
    assert interval == metrics.drift_interval(metrics.fid, features, other, prompts)
    low, high = metrics.vendi_interval(features, prompts)
    assert low < metrics.vendi(features) < high
    assert metrics.floor(metrics.fid, features, other, prompts) == metrics.floor(metrics.fid, features, other, prompts)
    assert (np.random.get_state()[1] == state).all()
    assert np.isnan(metrics.drift_interval(metrics.fid, features[:3], other[:3], prompts[:3])).all()
