"""How often each printed interval holds the truth: `pytest -s` prints the table of docs/evaluation.md.

Prompts are fixed and differ, noise is drawn anew in every trial. The truth of a mean is known; that of a figure of a
whole set is its mean over the trials: what sets of this size are expected to have.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from evaluation import certificate, metrics, tilts
from evaluation.metrics import Interval

SIZE = 24  # of the features
SPREAD = np.arange(1, SIZE + 1) ** -0.5
Trial = Callable[[np.random.Generator, int], tuple[float, Interval]]  # of n pictures: the figure, its interval


def prompts_of(n: int, count: int = 8) -> list[str]:
    return [f"prompt {i % count}" for i in range(n)]


def centres(n: int, *shape: int, count: int = 8) -> np.ndarray:
    """A prompt's own place [n, ...], the same in every trial."""
    return np.random.default_rng(5).normal(size=(count, *shape))[np.arange(n) % count]


def pictures(rng: np.random.Generator, n: int, moved: float = 0.0, count: int = 8) -> np.ndarray:
    """Features: prompts apart, noise about them; an adapter that has `moved` shifts and widens it."""
    noise = rng.normal(size=(n, SIZE)) * SPREAD * (1 + 0.3 * moved)
    return centres(n, SIZE, count=count) + noise + moved * np.eye(SIZE)[0]


def mean(draw: str, rng, n) -> tuple[float, Interval]:
    values = centres(n) + getattr(rng, draw)(size=n)
    return float(values.mean()), metrics.mean_interval(values, prompts_of(n))


def paired(rng, n) -> tuple[float, Interval]:
    before = centres(n) + rng.normal(size=n)
    gains = 0.1 * rng.exponential(size=n) * (1 + (np.arange(n) % 8) / 8)
    return float(gains.mean()), metrics.paired_interval(before, before + gains, prompts_of(n))


def share(p: float, rng, n) -> tuple[float, Interval]:
    values = (rng.random(n) < p).astype(float)
    return float(values.mean()), metrics.mean_interval(values, prompts_of(n))


def paired_share(rng, n) -> tuple[float, Interval]:
    u, v, again = rng.random((3, n))  # 15 % of the pictures become right, 5 % wrong
    before, after = (u < 0.5).astype(float), np.where(v < 0.4, again < 0.75, u < 0.5).astype(float)
    return float((after - before).mean()), metrics.paired_interval(before, after, prompts_of(n))


def distance(count: int, rng, n) -> tuple[float, Interval]:
    value, low, high = metrics.distance(pictures(rng, n, count=count), prompts_of(n, count))
    return value, (low, high)


def distance_change(rng, n) -> tuple[float, Interval]:
    before = pictures(rng, n)
    after = centres(n, SIZE) + 0.8 * (before - centres(n, SIZE)) + 0.3 * rng.normal(size=(n, SIZE)) * SPREAD
    value, low, high = metrics.distance(after, prompts_of(n), before)
    return value, (low, high)


def vendi(rng, n) -> tuple[float, Interval]:
    features = pictures(rng, n, 0.5)
    return metrics.vendi(features), metrics.vendi_interval(features, prompts_of(n))


def drift(of, moved: float, rng, n) -> tuple[float, Interval]:
    one, two = pictures(rng, n, moved), pictures(rng, n)
    return of(one, two), metrics.drift_interval(of, one, two, prompts_of(n))


CASES: dict[str, tuple[Trial, int]] = {
    "mean reward, normal": (partial(mean, "normal"), 2000),
    "mean reward, exponential": (partial(mean, "exponential"), 2000),
    "gain, skewed": (paired, 2000),
    "share, 0.1": (partial(share, 0.1), 2000),
    "share, 0.5": (partial(share, 0.5), 2000),
    "gain of a share": (paired_share, 2000),
    "distance, 8 prompts": (partial(distance, 8), 1000),
    "distance, n / 2 prompts": (lambda rng, n: distance(n // 2, rng, n), 1000),
    "change of the distance": (distance_change, 1000),
    "Vendi score": (vendi, 400),
    "Frechet distance, moved a little": (partial(drift, metrics.fid, 0.5), 400),
    "Frechet distance, moved far": (partial(drift, metrics.fid, 1.5), 400),
    "kernel distance, moved a little": (partial(drift, metrics.kid, 0.5), 400),
    "kernel distance, moved far": (partial(drift, metrics.kid, 1.5), 400),
}


def gap(spread: float, rng, n) -> float | None:
    """Whether the interval of the gap to a target holds the truth; None where none is given. beta x reward is normal,
    of that `spread`."""
    groups, shift = np.arange(n) % 8, 0.4 * spread
    base = centres(n) + spread * rng.normal(size=n)
    moved = centres(n) + 0.9 * (base - centres(n)) + shift + 0.3 * spread * rng.normal(size=n)
    truth = spread**2 / 2 - shift + 0.5
    _, (low, high), *_ = certificate.gap(1.0, moved, np.full(n, 0.5), groups, base[None])
    return float(low <= truth <= high) if tilts.known(base, groups, 1.0) else None


@pytest.mark.slow
@pytest.mark.parametrize("n", [32, 256, 1024])
@pytest.mark.parametrize("spread", [0.3, 1.0, 1.5, 2.0])
def test_a_gap_that_is_given_is_seldom_wrong(spread, n):
    """`spread` in nats, of beta x reward within a prompt: the larger, the more pictures log Z takes."""
    rng, trials = np.random.default_rng(n), 700
    held = [found for _ in range(trials) if (found := gap(spread, rng, n)) is not None]
    given, wrong = len(held) / trials, (len(held) - sum(held)) / trials
    print(f"\ngap to the target, spread {spread} | {n} | given {given:.0%}, of all wrong {wrong:.1%}", flush=True)
    assert wrong <= 0.10 + 2 * (0.1 * 0.9 / trials) ** 0.5 and (given > 0.9 or given < 0.2)


def coverage(trial: Trial, n: int, trials: int) -> float:
    rng = np.random.default_rng(n)
    values, intervals = zip(*(trial(rng, n) for _ in range(trials)), strict=True)
    low, high = np.transpose(intervals)
    return float(np.mean((low <= np.mean(values)) & (np.mean(values) <= high)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [32, 256])
@pytest.mark.parametrize("case", CASES)
def test_an_interval_holds_the_truth_as_often_as_it_says(case, n):
    trial, trials = CASES[case]
    share, error = coverage(trial, n, trials), (0.95 * 0.05 / trials) ** 0.5
    print(f"\n{case} | {n} | {share:.1%} of {trials}", flush=True)
    assert 0.93 - 2 * error <= share <= 0.97 + 2 * error


FLOORS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "mean": lambda one, two: abs(float(one.mean() - two.mean())),
    "fid": metrics.fid,
    "vendi": lambda one, two: abs(metrics.vendi(one) - metrics.vendi(two)),
}


@pytest.mark.slow
@pytest.mark.parametrize("n", [32, 256])
@pytest.mark.parametrize("figure", FLOORS)
def test_noise_passes_a_floors_upper_end_no_more_often_than_it_says(figure, n):
    rng, of, trials, below = np.random.default_rng(n), FLOORS[figure], 400, 0

    def draw() -> np.ndarray:
        return centres(n) + rng.exponential(size=n) if figure == "mean" else pictures(rng, n)

    for _ in range(trials):
        _, most = metrics.floor(of, draw(), draw(), prompts_of(n))
        below += of(draw(), draw()) <= most
    error = (0.95 * 0.05 / trials) ** 0.5
    print(f"\nnoise alone, {figure} | {n} | {below / trials:.1%} of {trials}", flush=True)
    assert 0.93 - 2 * error <= below / trials <= 0.97 + 2 * error
