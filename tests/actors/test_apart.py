"""Chunks that are scored one trajectory at a time, over a pool that only writes down what it is given."""

import numpy as np
import pytest

from actors.apart import Apart
from actors.reward_actor import RewardActor
from diffusion.trajectory import Chunk, Scores
from rewards.scorer import BadReward

KEY = ("train", 2, 1)


class Queue:
    def __init__(self) -> None:
        self.given: list[tuple] = []

    def submit(self, key, method, arguments, first=False) -> None:
        self.given.append((key, method, arguments()))

    def take(self) -> list[tuple]:
        given, self.given = self.given, []
        return given


@pytest.fixture
def queue():
    return Queue()


@pytest.fixture
def apart(queue):
    return Apart(queue, batch=4)


def begin(apart, queue, rows=2, clean="clean") -> list[tuple]:
    assert apart.begin(KEY, rows, clean)
    given = queue.take()
    assert [(method, arguments) for _, method, arguments in given] == [
        ("score_row", (clean, row, 4)) for row in range(rows)
    ]
    return [key for key, _, _ in given]


def test_rows_are_joined_once_all_are_in(apart, queue):
    first, second = begin(apart, queue)
    apart.answered(second, "scores of 1")
    assert queue.take() == []
    apart.hopeless(first, RuntimeError("it dies"))
    ((key, method, (rows, bad, *scores)),) = queue.take()
    assert (key, method, rows, scores) == (KEY, "join", [1], ["scores of 1"])
    assert bad == {0: "no reward actor survives scoring it: it dies"}


def test_rows_of_a_chunk_that_was_made_again_are_not_taken_for_the_new_ones(apart, queue):
    old = begin(apart, queue)
    assert apart.lost(old[0])  # with the node that held the clean predictions
    apart.forget(KEY)
    assert not apart.lost(old[1])  # for the same reason: once is enough
    new = begin(apart, queue, clean="clean again")
    apart.answered(new[0], "new 0")
    apart.answered(old[1], "old 1")
    apart.hopeless(old[1], RuntimeError("old"))
    assert queue.take() == [] and not apart.lost(old[0])
    apart.answered(new[1], "new 1")
    ((_, _, arguments),) = queue.take()
    assert arguments == ([0, 1], {}, "new 0", "new 1")


def test_a_chunk_whose_parts_cannot_be_joined_is_not_begun_again_and_again(apart, queue):
    for key in begin(apart, queue):
        apart.answered(key, "scores")
    assert not apart.begin(KEY, 2, "clean")
    apart.forget(KEY)  # but made again it is another one
    assert apart.begin(KEY, 2, "clean again")


def test_a_chunk_of_which_nothing_can_be_scored_is_an_error(apart, queue):
    first, second = begin(apart, queue)
    apart.hopeless(first, RuntimeError("it dies"))
    with pytest.raises(BadReward, match="none of the 2 trajectories of chunk 1 can be scored: it dies"):
        apart.hopeless(second, RuntimeError("it dies"))


def join(rewards: list[float], bad: dict[int, str]):
    """What a reward actor makes of rows of a chunk of two, each scored apart."""
    chunk = Chunk(1, "train", 2, 0, ("a", "b"), (6, 7))
    given = {}
    for row, reward in enumerate(rewards):
        values = np.full((2, 3), np.nan, np.float32)
        values[row] = reward
        reasons = {row: bad[row]} if row in bad else {}
        given[row] = Scores(chunk, values, thumbnails=(b"png",), bad=reasons)
    return RewardActor(lambda: None, shares_gpu=False).join(list(given), {}, *given.values())


def test_the_parts_verdict_is_the_chunks():
    scores, verdict = join([0.5, np.nan], {1: "black"})
    assert verdict.rewards[0] == 0.5 and np.isnan(verdict.rewards[1]) and verdict.bad == {1: "black"}
    assert scores.thumbnails == () and verdict.thumbnails == (b"png", b"png")


def test_parts_that_are_all_bad_are_the_chunks_error():
    with pytest.raises(BadReward, match=r"no trajectory of chunk 1 of epoch 2 is good; black"):
        join([np.nan, np.nan], {0: "black", 1: "white"})
