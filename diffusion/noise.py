"""Counter-based randomness: a draw is named by where it is used, never by what was drawn before it.

Philox with the run's seed as key and (epoch, trajectory, step) as counter: whichever actor makes a trajectory, and
whenever, it is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
