"""Counter-based randomness: a draw is named by where it is used, never by what was drawn before it. Philox with the
run's seed as key and (epoch, trajectory, step) as counter: whichever actor makes a trajectory, it is the same."""

import itertools
from collections.abc import Sequence

import numpy as np

from diffusion.settings import Selection

# What a draw is for: the second key word, so that no two uses share a stream.
ROLLOUT, EVALUATION, SELECTION, PROMPTS, REPLAY, SHUFFLE, GROUPS, PAST_UPDATES = range(8)
INITIAL_STATE = 0  # step 0 draws x_{t_1}; step i+1 draws the noise of transition i


def generator(seed: int, use: int, epoch: int = 0, item: int = 0, step: int = 0) -> np.random.Generator:
    """The stream of one use. All numbers must be >= 0; the lowest counter word is the stream's own."""
    return np.random.Generator(np.random.Philox(key=[seed, use], counter=[0, step, item, epoch]))


def normal(seed: int, use: int, epoch: int, items: Sequence[int], step: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normal float32 [len(items), *shape]; row i depends only on items[i] and the other arguments."""
    rows = [generator(seed, use, epoch, int(item), step).standard_normal(tuple(shape), np.float32) for item in items]
    return np.stack(rows)


def select_transitions(
    kind: Selection, fraction: float, num_steps: int, seed: int, epoch: int, trajectory_ids: Sequence[int]
) -> np.ndarray:
    """Which transitions are trained on, drawn before scoring, so that only needed states are scored:
    selected steps [B, K] int64, ascending in each row. random: round(fraction * num_steps) distinct ones, uniformly.
    low_variance: the last, and one of each of round(fraction * num_steps) equal stretches of the others (arXiv
    2412.07775, section "low-variance subsampling")."""
    if kind == "all":
        return np.tile(np.arange(num_steps), (len(trajectory_ids), 1))
    count = max(1, round(fraction * num_steps))
    rows = []
    for item in trajectory_ids:
        rng = generator(seed, SELECTION, epoch, int(item))
        if kind == "random":
            rows.append(np.sort(rng.choice(num_steps, count, replace=False)))
        else:
            count = min(count, num_steps - 1)
            edges = np.linspace(0, num_steps - 1, count + 1).round().astype(int)
            inner = [int(rng.integers(low, high)) for low, high in itertools.pairwise(edges)]
            rows.append(np.array([*inner, num_steps - 1]))
    return np.stack(rows).astype(np.int64)
