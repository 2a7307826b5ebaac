"""The gap to a target that is known: Gaussian rewards under the base model, and policies that shift them."""

import numpy as np
import pytest

from evaluation import certificate, tilts
from evaluation.image_sets import Evaluated

N, STEPS, BETA = 4096, 4, 1.2
RNG = np.random.default_rng(0)
PROMPTS = [f"prompt {i % 8}" for i in range(N)]
PLACES = np.arange(N) % 8.0  # rewards of prompts differ
BASE, OTHER = RNG.normal(size=(2, N)) + PLACES


def policy(shift: float, spread: float = 0.0) -> Evaluated:
    """Draws rewards of mean `shift` above the base model's and its variance 1, in STEPS equal steps, at its noise;
    `spread` is added to the log-ratio by what the reward does not ask for."""
    drawn = BASE - PLACES
    ratio = shift * drawn + shift**2 / 2 + spread * np.random.default_rng(1).normal(size=N)
    kl = np.tile([0.1, 0.2, 0.3, 0.4], (N, 1)) * (shift**2 + spread**2) / 2
    return Evaluated(PROMPTS, BASE + shift, {}, None, kl, ratio)


@pytest.mark.parametrize("shift", [0.0, 0.5, BETA, 2.0])
def test_the_gap_is_the_kl_to_the_target(shift):
    found = certificate.measure(policy(shift), [BASE, OTHER], BETA)
    truth = (shift - BETA) ** 2 / 2
    assert found["gap_low"] <= truth <= found["gap_high"] and found["gap_high"] - found["gap_low"] < 0.2
    assert found["base_gap"] == pytest.approx(BETA**2 / 2, abs=0.08) and found["no_gap"] is None
    assert found["nats"] == pytest.approx(shift**2 / 2) == pytest.approx(sum(found["nats_by_transition"]))
    assert np.allclose(found["nats_by_transition"], np.array([0.1, 0.2, 0.3, 0.4]) * shift**2 / 2)
    assert found["bound"] == pytest.approx(min(1, (found["gap_high"] / 2) ** 0.5))
    assert found["explained"] == pytest.approx(1 - (1 - shift / BETA) ** 2)
    assert found["gain"] == pytest.approx(shift)
    if shift < 2:  # a shift is the ideal tilt of a Gaussian
        assert found["ideal_gain"] == pytest.approx(shift, abs=0.05)
    if shift == 0:
        assert found["gap"] == found["base_gap"]


def test_what_the_reward_does_not_ask_for_costs_nats_and_explains_nothing():
    straight, astray = (certificate.measure(policy(BETA, spread), [BASE], BETA) for spread in (0.0, 2.0))
    assert straight["explained"] == pytest.approx(1) and astray["explained"] < 0
    assert astray["gap"] - straight["gap"] == pytest.approx(2)
    assert astray["gain"] == pytest.approx(BETA) and (astray["ideal_gain"] or 9) > 1.5


def test_too_few_pictures_are_said_instead_of_a_gap():
    few = certificate.measure(policy(0.0), [BASE], 6.0)
    assert few["gap"] is few["gap_high"] is few["bound"] is None and few["ess"] < 7
    assert few["no_gap"].startswith("too few pictures: 512 base pictures of a prompt count as ") and few["nats"] == 0
    alone = policy(0.0)
    alone = Evaluated([str(i) for i in range(N)], alone.rewards, {}, None, alone.kl, alone.log_ratio)
    single = certificate.measure(alone, [BASE], 1.0)
    assert single["no_gap"] == "no prompt has two good pictures" and single["nats"] == 0 and single["gain"] == 0
    none = certificate.measure(policy(1.0), [BASE], None, "ddpo has no target")
    assert none["no_gap"] == "ddpo has no target" and none["gap"] is None and none["ideal_gain"] is not None
    old = certificate.measure(Evaluated(PROMPTS, BASE, {}, None), [BASE], 1.0)
    assert old["no_gap"] == certificate.UNMEASURED and old["nats"] is None


def test_bad_pictures_are_left_out_on_both_sides():
    whole, bad = policy(0.5), policy(0.5)
    bad.rewards[:800:2], base = np.nan, BASE.copy()
    base[1:800:2] = np.nan
    rest = slice(800, None)
    assert whole.kl is not None and whole.log_ratio is not None
    cut = Evaluated(PROMPTS[rest], whole.rewards[rest], {}, None, whole.kl[rest], whole.log_ratio[rest])
    assert certificate.measure(bad, [base], BETA) == certificate.measure(cut, [BASE[rest]], BETA)


def test_judgements_have_their_figures_where_the_table_looks_for_them():
    found = certificate.judgement(policy(0.5), [BASE], BETA)
    assert set(found) == {"gap", "nats", "certificate"} and set(found["gap"]) == {"value", "low", "high", "base"}
    assert found["nats"]["base"] == 0 and found["certificate"]["exponent"] == BETA
    assert certificate.judgement(policy(0.5), [BASE], None, "none")["gap"] is None


def test_weights_are_the_tilts_own_within_every_prompt():
    rewards, groups = np.array([0.0, 1000.0, 1.0, 2.0]), np.array([0, 0, 1, 1])
    weighted = tilts.weights(rewards, groups, 1.0)
    np.testing.assert_allclose(weighted, [0, 1, 1 / (1 + np.e), np.e / (1 + np.e)], atol=1e-12)
    sizes = tilts.sample_sizes(weighted, groups)
    assert sizes[0] == 1 and sizes[1] == pytest.approx(1 / (weighted[2] ** 2 + weighted[3] ** 2))
    few, many = (np.repeat([0, 1], n) for n in (4, 400))
    rng = np.random.default_rng(0)
    assert tilts.known(rng.normal(size=8), few, 1.0) and not tilts.known(rng.normal(size=8), few, 3.0)
    assert tilts.known(rng.normal(size=800), many, 2.0) and not tilts.known(rng.normal(size=800), many, 4.0)
    assert not tilts.known(np.ones(2), np.arange(2), 1.0)


def test_an_ideal_tilt_costs_as_many_nats_as_it_is_given():
    rewards, groups = np.tile([0.0, 0.0, 0.0, 1.0], 64), np.repeat(np.arange(4), 64)
    for share in (0.3, 0.5, 0.8):  # of the ones, from a quarter
        nats = share * np.log(share / 0.25) + (1 - share) * np.log((1 - share) / 0.75)
        assert tilts.ideal_gain(rewards, groups, nats) == pytest.approx(share - 0.25, abs=1e-6)
    assert tilts.ideal_gain(rewards, groups, 0.0) == pytest.approx(0, abs=1e-6)
    assert tilts.ideal_gain(rewards, groups, 2.0) is None  # more than ln 4: no weights have as many
    assert (
        tilts.ideal_gain(np.ones(8), groups[:8], 0.1) is None and tilts.ideal_gain(rewards[:0], groups[:0], 1) is None
    )
