"""Where a reward is settled: on processes whose shares are known, through the chunks that samplers would get."""

import numpy as np
import pytest

from diffusion import noise
from diffusion.trajectory import Scores
from evaluation import settling
from evaluation.image_sets import Cache

WEIGHTS = np.sqrt([0.05, 0.15, 0.5, 0.27, 0.03])  # of the noise of x_0 and of four transitions
SHARES = np.cumsum(WEIGHTS**2)[:4]


class MadeUp:
    """A reward that adds up the noise of a path of four transitions, and what its prompt is worth."""

    description, started = "made up", 0

    def judge(self, snapshot, chunks, done) -> None:
        assert not snapshot.flat.any()
        for chunk in chunks:
            use, rewards = noise.EVALUATION, np.full((len(chunk.prompts), 5), np.nan, np.float32)
            drawn = [noise.normal(chunk.seed, use, chunk.epoch, chunk.noise_ids(step), step, ()) for step in range(5)]
            rewards[:, -1] = WEIGHTS @ np.stack(drawn) + [10.0 * len(prompt) for prompt in chunk.prompts]
            done(chunk, Scores(chunk, rewards))

    def close(self) -> None: ...


def measured(config, tmp_path, pools, prompts=("a", "ab", "abc")):
    return settling.measure(
        settling.continuations(config, prompts), Cache(tmp_path), pools, lambda doing, done, total: None
    )


def test_the_profile_of_a_known_process_and_its_window(small_config, tmp_path, monkeypatch):
    config = small_config("sampler.chunk_size=8", "evaluation.images=8")
    monkeypatch.setattr(settling, "STARTS", 600)
    profile = measured(config, tmp_path, MadeUp)
    assert [each["state"] for each in profile] == [0, 1, 2, 3, 4]
    assert profile[-1] == {"state": 4, "share": 1.0, "low": 1.0, "high": 1.0}
    for each, share in zip(profile, SHARES, strict=False):
        assert each["share"] == pytest.approx(share, abs=0.07)
        assert each["low"] - 0.01 < share < each["high"] + 0.01  # all four states share their starts
        assert each["high"] - each["low"] < 0.2
    assert settling.window(profile, 0.95) == (0, 2) and settling.window(profile, 0.99) == (0, 3)
    assert settling.window(profile, 0.5) == (0, 1) and settling.window(profile, 0.01) == (0, 0)  # one at the least
    assert "objective.window=[0, 2]" in settling.table(profile, 0.95)[-1]


def test_it_is_measured_once_for_what_it_depends_on(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(settling, "STARTS", 9)
    config, starts = small_config(), []

    def pools():
        starts.append(1)
        return MadeUp()

    first = measured(config, tmp_path, pools)
    learner = {"update": {"objective": config.objective.model_copy(update={"beta": 3.0})}}
    assert measured(config.model_copy(**learner), tmp_path, pools) == first and len(starts) == 1
    assert measured(config, tmp_path, pools, ("a", "b")) != first and len(starts) == 2
    for changed in ("sampler.eta=0.5", "sampler.guidance=2", "reward.name=jpeg_compressibility", "evaluation.seed=1"):
        measured(small_config(changed), tmp_path, pools)
    assert len(starts) == 6


def test_many_steps_are_measured_at_some_states_and_none_where_no_noise_is_left(small_config):
    of = settling.continuations(small_config("sampler.steps=50"), [f"prompt {i}" for i in range(40)])
    assert of.states == list(range(0, 50, 5)) and len(of.prompts) == settling.PROMPTS
    rows = [row for chunk in of.chunks() for row in zip(chunk.trajectory_ids, chunk.parents, chunk.forks, strict=True)]
    assert len(rows) == of.pictures and [number for number, *_ in rows] == list(range(of.pictures))
    mine = sum(50 if number == parent else 50 - fork for number, parent, fork in rows)
    assert mine == of.transitions
    window = small_config("sampler.noise=window", "objective.window=[0, 1]", "objective.last_transition=train")
    assert settling.continuations(window, ["a"]).states == [0, 1]


def test_bad_pictures_leave_their_state_out_and_equal_rewards_are_refused():
    rng = np.random.default_rng(0)
    rewards, prompts = rng.normal(size=(20, 1)) + rng.normal(size=(20, 3)), ["a", "b"] * 10
    bad = np.concatenate([rewards, [[np.nan, 1.0, 2.0], [5.0, 5.0, 9.0]]])
    assert settling.settled_share(bad, [*prompts, "a", "alone"]) == settling.settled_share(rewards, prompts)
    with pytest.raises(settling.NothingToSettle, match="all have one reward"):
        settling.settled_share(np.ones((20, 3)), prompts)
    with pytest.raises(settling.NothingToSettle, match="too few good ones"):
        settling.settled_share(np.full((20, 3), np.nan), prompts)
    share, low, high = settling.settled_share(np.tile(rng.normal(size=(20, 1)), 3), prompts)
    assert share == pytest.approx(1) and low == pytest.approx(1) and high == pytest.approx(1)


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.84, 0.95])
@pytest.mark.parametrize("shape", ["normal", "uniform", "skewed", "right or wrong"])
def test_how_often_the_interval_holds(shape, share, count):
    """On the starts and branches of a measurement, with prompts apart. The truth is that of 200,000 pairs."""
    form = {
        "normal": lambda z: z, "uniform": lambda z: 1 / (1 + np.exp(-1.7 * z)), "skewed": lambda z: np.exp(0.5 * z),
        "right or wrong": lambda z: (z > 0.5).astype(float),
    }[shape]  # fmt: skip
    rng, prompts = np.random.default_rng(1), [f"prompt {i % count}" for i in range(settling.STARTS)]

    def draw(starts, branches):
        z = np.sqrt(share) * rng.normal(size=(starts, 1)) + np.sqrt(1 - share) * rng.normal(size=(starts, branches))
        return form(z)

    truth = np.corrcoef(draw(200_000, 2).T)[0, 1]
    apart = 3.0 * (np.arange(settling.STARTS) % count)[:, None]
    trials = [settling.settled_share(draw(settling.STARTS, settling.BRANCHES) + apart, prompts) for _ in range(60)]
    values, low, high = np.transpose(trials)
    print(f"{shape:15} {truth:.3f}: mean {values.mean():.3f}, holds {np.mean((low <= truth) & (truth <= high)):.2f}")
    assert values.mean() == pytest.approx(truth, abs=0.05)
    assert np.mean((low <= truth) & (truth <= high)) >= 0.8  # of .95; 60 trials err by .03
