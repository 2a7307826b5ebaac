"""Total variation, floors, weights and drift, on made-up pictures of which every law is known."""

import numpy as np
import pytest

from evaluation import targets
from evaluation.targets import Sample, Target, floor, judge, laws, variations

VALUES = {"place": ("left", "middle", "right"), "colour": ("red", "blue")}
LAW, COLOURS = np.array([0.5, 0.3, 0.2]), np.array([0.7, 0.3])
REWARDS, BETA = np.array([0.0, 0.5, 1.0]), 1.5
TILTED = LAW * np.exp(BETA * REWARDS) / (LAW * np.exp(BETA * REWARDS)).sum()


def prompts_of(n: int) -> list[str]:
    return [f"prompt {i % 2}" for i in range(n)]


def drawn(rng: np.random.Generator, n: int, law=LAW, colours=COLOURS) -> Sample:
    """The reward sees the place alone; features stand apart where places differ."""
    place, colour = rng.choice(3, n, p=law), rng.choice(2, n, p=colours)
    return Sample(REWARDS[place] + 0.0, np.eye(3)[place], {"place": place, "colour": colour})


def judged(n=8000, seed=0, **law) -> dict:
    rng = np.random.default_rng(seed)
    tuned = drawn(rng, n, **law)
    return judge(Target(BETA, prompts_of(n), tuned, [drawn(rng, n), drawn(rng, n)]), VALUES)


def test_the_target_is_known_without_any_training():
    found = judged()
    place, colour = found["attributes"]
    np.testing.assert_allclose(place["target"], TILTED, atol=0.02)
    np.testing.assert_allclose(place["base"], LAW, atol=0.02)
    truth = variations(LAW[None], TILTED[None])[0]
    assert place["tv"]["value"] == pytest.approx(truth, abs=0.02) and place["tv"]["base"] == pytest.approx(
        truth, abs=0.02
    )
    assert place["tv"]["low"] < truth < place["tv"]["high"] and place["tv"]["high"] - place["tv"]["low"] < 0.05
    assert found["reward"]["target_low"] < TILTED @ REWARDS < found["reward"]["target_high"]
    assert found["reward"]["over"] == pytest.approx((LAW - TILTED) @ REWARDS, abs=0.02)
    apart = 1 - (TILTED**2).sum()
    assert found["distance"]["target_low"] < apart < found["distance"]["target_high"]
    # What the reward does not see is at the floor, given the place or not.
    assert found["given"] == "place" and place["drift"] is None
    assert colour["tv"]["value"] < 2 * colour["tv"]["floor_high"] and colour["drift"]["value"] < 0.03
    assert found["warning"] is None and colour["drift"]["judged"] == 1


def test_at_the_target_everything_is_at_its_floor_and_beyond_it_is_seen():
    there = judged(law=TILTED)
    (place, _), reward = there["attributes"], there["reward"]
    assert place["tv"]["value"] <= 1.5 * place["tv"]["floor_high"] < 0.05 < place["tv"]["base"]
    assert reward["over_low"] < 0 < reward["over_high"]
    beyond = judged(law=np.array([0.02, 0.08, 0.9]))
    assert beyond["reward"]["over_low"] > 0 and beyond["attributes"][0]["tv"]["low"] > 0.3
    astray = judged(law=TILTED, colours=np.array([0.3, 0.7]))
    drift = astray["attributes"][1]["drift"]
    assert drift["value"] == pytest.approx(0.4, abs=0.03) and drift["floor_high"] < 0.05
    assert astray["attributes"][0]["tv"]["value"] < 0.03


def test_an_untrained_model_has_the_bases_own_figures():
    rng = np.random.default_rng(3)
    base, other = drawn(rng, 400), drawn(rng, 400)
    found = judge(Target(BETA, prompts_of(400), base, [base, other]), VALUES)
    for law in found["attributes"]:
        assert law["tv"]["value"] == law["tv"]["base"]
    assert found["reward"]["value"] == found["reward"]["base"]


def test_too_large_an_exponent_is_warned_of():
    rng, n = np.random.default_rng(0), 200
    sets = [drawn(rng, n) for _ in range(3)]
    for part in sets:
        part.rewards[:] += rng.normal(size=n)
    found = judge(Target(20.0, prompts_of(n), sets[0], sets[1:]), VALUES)
    assert found["ess"] < 20 and "beta 20 is too large for 400 base pictures" in found["warning"]
    assert found["ess_least"] <= found["ess"]


def test_bad_pictures_are_left_out_of_all_sets():
    rng, n = np.random.default_rng(0), 300
    tuned, base, other = (drawn(rng, n) for _ in range(3))
    whole = judge(Target(BETA, prompts_of(200), *cut(tuned, base, other, slice(100, None))), VALUES)
    for i, part in enumerate((tuned, base, other)):
        part.rewards[i:100:3] = np.nan
    assert judge(Target(BETA, prompts_of(n), tuned, [base, other]), VALUES) == whole
    with pytest.raises(ValueError, match="no prompt has two good pictures"):
        Target(BETA, [str(i) for i in range(n)], tuned, [base, other])


def cut(tuned, base, other, rows):
    one, *rest = (
        Sample(part.rewards[rows], part.features[rows], {name: codes[rows] for name, codes in part.codes.items()})
        for part in (tuned, base, other)
    )
    return one, rest


def test_laws_and_variations():
    codes, groups, weights = np.array([0, 1, 1, 2]), np.array([0, 0, 1, 1]), np.array([1.0, 3.0, 1.0, 1.0])
    found = laws(codes, groups, weights, 3)
    np.testing.assert_allclose(found, [[0.25, 0.75, 0], [0, 0.5, 0.5]])
    np.testing.assert_allclose(variations(found, found[::-1]), [0.5, 0.5])


def test_no_base_picture_beside_a_tuned_one_is_said():
    rng, n = np.random.default_rng(0), 200
    tuned, base = drawn(rng, n), drawn(rng, n)
    tuned.codes["place"][:] = np.where(np.arange(n) < 50, 1, tuned.codes["place"])
    base.codes["place"][:] = 0
    found = Target(BETA, prompts_of(n), tuned, [base]).drift("colour", 2, "place", 3)
    assert found["judged"] == pytest.approx((tuned.codes["place"] == 0).mean())
    tuned.codes["place"][:] = 1
    none = Target(BETA, prompts_of(n), tuned, [base]).drift("colour", 2, "place", 3)
    assert none["value"] is None and none["judged"] == 0


def test_noise_alone_passes_the_floor_no_more_often_than_it_says():
    rng, n, below, trials = np.random.default_rng(0), 300, 0, 150
    groups = np.tile(np.arange(n) % 2, 2)
    for _ in range(trials):
        tuned, pool = rng.choice(3, n, p=TILTED), rng.choice(3, 2 * n, p=LAW)
        weights = np.exp(BETA * REWARDS[pool])
        aim = laws(pool, groups, weights, 3)
        counts = np.array([n // 2, n // 2])
        _, most = floor(counts, aim, groups, pool, weights)
        below += variations(laws(tuned, groups[:n], np.ones(n), 3), aim) @ counts / n <= most
    assert 0.90 <= below / trials <= 0.99


@pytest.mark.parametrize("law", [LAW, np.array([0.1, 0.2, 0.7])], ids=["base", "beyond"])
def test_intervals_hold_the_figure_of_sets_of_this_size(law, monkeypatch):
    monkeypatch.setattr(targets, "DRAWS", 1)
    rng, n, trials = np.random.default_rng(1), 160, 200
    found = []
    for _ in range(trials):
        target = Target(BETA, prompts_of(n), drawn(rng, n, law), [drawn(rng, n), drawn(rng, n)])
        tv, reward, distance = target.law("place", 3)["tv"], target.reward(), target.distance()
        assert distance is not None
        found.append([
            [tv["value"], tv["low"], tv["high"]],
            [reward["over"], reward["over_low"], reward["over_high"]],
            [distance["target"], distance["target_low"], distance["target_high"]],
        ])  # fmt: skip
    values, lows, highs = np.transpose(np.array(found, float))
    share = ((lows <= values.mean(1, keepdims=True)) & (values.mean(1, keepdims=True) <= highs)).mean(1)
    assert (share > 0.95 - 3 * (0.95 * 0.05 / trials) ** 0.5).all()
