"""Dispatch by itself, over fake actors: balance, limits, deadlines."""

import time

import pytest

from actors import pool as pool_module
from actors.pool import Pool
from cluster.waits import DeadlineExceeded


class FakeActor:
    """Hands out references that are done when the test says so."""

    def __init__(self, name: str) -> None:
        self.name, self.calls = name, []
        self.work = self

    def remote(self, *arguments):
        ref = (self.name, *arguments)
        self.calls.append(ref)
        return [("big", ref), ref]


@pytest.fixture
def done(monkeypatch):
    """References in this set count as finished."""
    finished: set = set()
    monkeypatch.setattr(pool_module, "wait_any", lambda refs, seconds: [r for r in refs if r in finished][:1])
    monkeypatch.setattr(pool_module, "get", lambda ref, *_: f"summary of {ref[1]}")
    return finished


def test_work_goes_to_the_least_busy_actor_and_never_more_than_the_limit(done):
    actors = [FakeActor("a"), FakeActor("b")]
    pool = Pool("sampling", actors, 60, in_flight=2)
    for i in range(6):
        pool.submit(i, "work", i)
    assert pool.pump() == []
    assert [len(actor.calls) for actor in actors] == [2, 2] and pool.busy
    done.add(actors[1].calls[0])
    ((key, outputs, summary),) = pool.pump()
    assert (key, summary) == (1, "summary of 1") and outputs == [("big", ("b", 1))]
    assert [len(actor.calls) for actor in actors] == [2, 3]


def test_everything_submitted_comes_back_once(done):
    actors = [FakeActor("a"), FakeActor("b"), FakeActor("c")]
    pool = Pool("scoring", actors, 60)
    for i in range(10):
        pool.submit(i, "work", i)
    seen = []
    while pool.busy:
        done.update(ref for actor in actors for ref in actor.calls)
        seen += [key for key, _, _ in pool.pump()]
    assert sorted(seen) == list(range(10))


def test_the_clock_of_a_queued_call_starts_when_its_actor_is_free(done, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: now[0])
    actor = FakeActor("a")
    pool = Pool("sampling", [actor], seconds=10, in_flight=2)
    for i in range(2):
        pool.submit(i, "work", i)
    pool.pump()
    now[0] = 9.0
    done.add(actor.calls[0])
    assert [key for key, _, _ in pool.pump()] == [0]
    now[0] = 18.0  # 18 s after it was handed out, 9 s after it could run
    assert pool.pump() == []
    now[0] = 20.0
    with pytest.raises(DeadlineExceeded, match="sampling on 1 "):
        pool.pump()


def test_a_call_that_never_ends_meets_its_deadline(done):
    pool = Pool("sampling", [FakeActor("a")], seconds=0.01, in_flight=1)
    pool.submit(7, "work", 7)
    pool.pump()
    time.sleep(0.05)
    with pytest.raises(DeadlineExceeded, match=r"sampling on 7 .*run\.chunk_seconds"):
        pool.pump()
