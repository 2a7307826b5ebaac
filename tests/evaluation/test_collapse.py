"""Signs of collapse: what rises, what falls, and what is only noise."""

import numpy as np
import pytest

from evaluation.collapse import FALL, signs
from evaluation.image_sets import Evaluated

N = 64
RNG = np.random.default_rng(0)
PROMPTS = [f"prompt {i % 8}" for i in range(N)]
BASE = RNG.normal(size=(N, 16))
REWARD = RNG.normal(size=N)
OTHER = RNG.normal(size=N)


def evaluated(rise=0.5, held_out_fall=0.0, spread=1.0, features=True):
    """After training: rewards and held-out moved, each prompt's pictures drawn together by `spread`."""
    centre = RNG.normal(size=(8, 16))[[i % 8 for i in range(N)]]
    moved = spread * BASE + (1 - spread) * 3 * centre
    rewards, held_out = REWARD + rise + 0.1 * RNG.normal(size=N), OTHER - held_out_fall + 0.1 * RNG.normal(size=N)
    return Evaluated(PROMPTS, rewards, {"other": held_out}, moved if features else None)


BEFORE = Evaluated(PROMPTS, REWARD, {"other": OTHER}, BASE)


def test_what_falls_while_the_reward_rises_is_said():
    assert signs(BEFORE, evaluated()) == []
    (alike,) = signs(BEFORE, evaluated(spread=0.2))
    assert alike.startswith("diversity fell to ") and alike.endswith("% of the base model's")
    (fell,) = signs(BEFORE, evaluated(held_out_fall=1.0))
    assert fell.startswith("held-out other fell by 1")
    assert signs(BEFORE, evaluated(held_out_fall=0.8 * FALL * OTHER.std())) == []  # surely, but not far
    assert len(signs(BEFORE, evaluated(spread=0.2, held_out_fall=1.0))) == 2
    for rise in (0.0, -0.5):
        assert signs(BEFORE, evaluated(rise=rise, spread=0.2, held_out_fall=1.0)) == []


def test_a_fall_that_noise_explains_is_none_and_bad_images_are_left_out():
    other = OTHER.copy()
    other[0] -= 200.0  # large on average, of one picture in many
    assert signs(BEFORE, Evaluated(PROMPTS, REWARD + 1, {"other": other}, BASE)) == []
    bare = Evaluated(PROMPTS, REWARD, {}, None)
    assert signs(bare, evaluated(features=False)) == []
    now = evaluated(spread=0.2)
    now.rewards[:4] = np.nan
    now.features[:4] = np.nan
    assert len(signs(BEFORE, now)) == 1


@pytest.mark.parametrize(("kept", "flagged"), [(0.68, True), (0.72, False)])
def test_seven_tenths_of_the_distance_within_prompts_must_be_left(kept, flagged):
    angle = np.arccos(1 - kept)
    pairs = [f"prompt {i // 2}" for i in range(N)]
    apart = np.tile([[1.0, 0.0], [0.0, 1.0]], (N // 2, 1))
    nearer = np.tile([[1.0, 0.0], [np.cos(angle), np.sin(angle)]], (N // 2, 1))
    before, now = Evaluated(pairs, REWARD, {}, apart), Evaluated(pairs, REWARD + 1, {}, nearer)
    assert bool(signs(before, now)) == flagged
