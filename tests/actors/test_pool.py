"""Dispatch by itself, over fake actors: balance, limits, deadlines, replacement of the dead."""

import pytest

from actors import pool as pool_module
from actors.pool import Limits, Pool
from cluster.waits import ActorDied, DeadlineExceeded, ObjectLost


class FakeActor:
    """Hands out references that are done when the test says so."""

    def __init__(self, world, name: str) -> None:
        self.world, self.name, self.calls, self.dead = world, name, [], False
        self.work, self.ready = Method(self._work), Method(self._ready)

    def _work(self, *arguments):
        ref = (self.name, *arguments)
        self.calls.append(ref)
        if self.dead:
            self.world.failed[ref] = ActorDied(f"{self.name} is gone")
        return [("big", ref), ref]

    def _ready(self):
        ref = ("ready", self.name)
        if self.dead:
            self.world.failed[ref] = ActorDied(f"{self.name} is gone")
        elif self not in self.world.spawned:
            self.world.done.add(ref)  # those of the beginning are up
        return ref


class Method:
    def __init__(self, function) -> None:
        self.remote = function


class World:
    """What Ray would know: finished references, failed ones, time."""

    def __init__(self) -> None:
        self.done, self.failed, self.killed, self.spawned, self.said = set(), {}, [], [], []
        self.now = 0.0

    def actors(self, *names):
        return [FakeActor(self, name) for name in names]

    def done_of(self, refs, seconds=0.0):
        return [ref for ref in refs if ref in self.done or ref in self.failed]

    def get(self, ref, *_):
        if ref in self.failed:
            raise self.failed[ref]
        return f"summary of {ref[1]}"

    def kill(self, actor):
        self.killed.append(actor)
        self.die(actor)

    def die(self, actor):
        actor.dead = True
        self.failed |= {ref: ActorDied(f"{actor.name} is gone") for ref in actor.calls if ref not in self.done}

    def spawn(self):
        self.spawned.append(FakeActor(self, f"spare{len(self.spawned)}"))
        return self.spawned[-1]

    def pool(self, actors, seconds=10.0, ready=10.0, attempts=3, in_flight=2):
        limits = Limits(seconds, ready, attempts)
        return Pool("sampling", list(actors), self.spawn, limits, self.said.append, in_flight)


@pytest.fixture
def world(monkeypatch):
    world = World()
    monkeypatch.setattr(pool_module, "done", world.done_of)
    monkeypatch.setattr(pool_module, "get", world.get)
    monkeypatch.setattr(pool_module.ray, "kill", world.kill)
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: world.now)
    return world


def finish(world, pool, rounds=200) -> list:
    """Let everything that was handed out be done until the pool is idle; the keys that came back."""
    seen = []
    for _ in range(rounds):
        if not pool.busy:
            return seen
        for actor in pool.actors:
            world.done.update(ref for ref in actor.calls if ref not in world.failed)
        world.done.update(("ready", actor.name) for actor in world.spawned)
        seen += [key for key, _, _ in pool.pump()]
    raise AssertionError("the pool never became idle")


def test_work_goes_to_the_least_busy_actor_and_never_more_than_the_limit(world):
    actors = world.actors("a", "b")
    pool = world.pool(actors)
    for i in range(6):
        pool.submit(i, "work", i)
    assert pool.pump() == []
    assert [len(actor.calls) for actor in actors] == [2, 2] and pool.busy
    world.done.add(actors[1].calls[0])
    ((key, outputs, summary),) = pool.pump()
    assert (key, summary) == (1, "summary of 1") and outputs == [("big", ("b", 1))]
    assert [len(actor.calls) for actor in actors] == [2, 3]


def test_everything_submitted_comes_back_once(world):
    pool = world.pool(world.actors("a", "b", "c"))
    for i in range(10):
        pool.submit(i, "work", i)
    assert sorted(finish(world, pool)) == list(range(10))


def test_the_clock_of_a_queued_call_starts_when_its_actor_is_free(world):
    (actor,) = world.actors("a")
    pool = world.pool([actor])
    for i in range(2):
        pool.submit(i, "work", i)
    pool.pump()
    world.now = 9.0
    world.done.add(actor.calls[0])
    assert [key for key, _, _ in pool.pump()] == [0]
    world.now = 18.0  # 18 s after it was handed out, 9 s after it could run
    assert pool.pump() == [] and not world.killed
    world.now = 20.0
    pool.pump()
    assert world.killed == [actor]


def test_what_a_dead_actor_had_in_hand_goes_to_others_and_nothing_else(world):
    dead, alive = world.actors("dead", "alive")
    pool = world.pool([dead, alive])
    lost = []
    pool.on_lost = lost.append
    for i in range(6):
        pool.submit(i, "work", i)
    pool.pump()
    in_hand = [ref[1] for ref in dead.calls]
    world.die(dead)
    assert sorted(finish(world, pool)) == list(range(6))
    assert sorted(lost) == sorted(in_hand)
    assert len(world.spawned) == 1 and pool.actors == [alive, world.spawned[0]]
    assert any("dead is gone" in text for text in world.said)


def test_what_a_dying_actor_had_finished_is_kept(world):
    (dead,) = world.actors("dead")
    pool = world.pool([dead])
    lost = []
    pool.on_lost = lost.append
    for i in range(2):
        pool.submit(i, "work", i)
    pool.pump()
    world.done.add(dead.calls[0])
    world.die(dead)
    assert sorted(finish(world, pool)) == [0, 1] and lost == [1]


def test_the_last_actor_may_die_too(world):
    (only,) = world.actors("only")
    pool = world.pool([only])
    for i in range(5):
        pool.submit(i, "work", i)
    pool.pump()
    world.die(only)
    assert sorted(finish(world, pool)) == list(range(5))
    assert pool.actors == world.spawned


def test_a_hung_actor_is_killed_and_its_work_done_elsewhere(world):
    (hung,) = world.actors("hung")
    pool = world.pool([hung], in_flight=1)
    pool.submit(7, "work", 7)
    pool.pump()
    world.now = 11.0
    pool.pump()
    assert world.killed == [hung] and any("run.chunk_seconds=10" in text for text in world.said)
    assert finish(world, pool) == [7]


def test_a_chunk_that_kills_every_actor_ends_the_run_naming_it(world):
    pool = world.pool(world.actors("a"), attempts=3, in_flight=1)
    pool.submit(7, "work", 7)
    with pytest.raises(ActorDied, match=r"tried 3 times, run\.chunk_attempts"):
        for _ in range(20):
            pool.pump()
            for actor in pool.actors:
                world.die(actor)
            world.done.update(("ready", actor.name) for actor in world.spawned)
    assert len(world.spawned) == 2


def test_a_chunk_that_hangs_every_actor_ends_the_run_with_its_deadline(world):
    pool = world.pool(world.actors("a"), attempts=2, in_flight=1)
    pool.submit(7, "work", 7)
    with pytest.raises(DeadlineExceeded, match=r"sampling 7 .*run\.chunk_seconds"):
        for _ in range(20):
            pool.pump()
            world.now += 11
            world.done.update(("ready", actor.name) for actor in world.spawned)


def test_replacements_that_never_start_end_the_run_only_when_nobody_is_left(world):
    dead, alive = world.actors("dead", "alive")
    pool = world.pool([dead, alive], ready=5, attempts=2, seconds=1000)
    for i in range(4):
        pool.submit(i, "work", i)
    pool.pump()
    world.die(dead)
    for _ in range(6):
        world.now += 6
        pool.pump()
    assert len(world.spawned) == 2 and pool.actors == [alive]
    world.die(alive)
    with pytest.raises(DeadlineExceeded, match=r"run|up"):
        for _ in range(20):
            world.now += 6
            pool.pump()


def test_work_whose_input_is_gone_is_handed_back(world):
    (actor,) = world.actors("a")
    pool = world.pool([actor])
    pool.submit(3, "work", 3)
    pool.pump()
    world.failed[actor.calls[0]] = ObjectLost("the node went")
    assert pool.pump() == [] and pool.inputs_lost == [3] and not pool.busy and pool.actors == [actor]


def test_what_remote_code_raises_is_never_tried_again(world):
    (actor,) = world.actors("a")
    pool = world.pool([actor])
    pool.submit(3, "work", 3)
    pool.pump()
    world.failed[actor.calls[0]] = ZeroDivisionError("data")
    with pytest.raises(ZeroDivisionError):
        pool.pump()
    assert len(actor.calls) == 1 and not world.spawned


def test_actors_that_died_while_idle_cost_no_chunk_an_attempt(world):
    actors = world.actors("a", "b", "c", "d")
    pool = world.pool(actors, attempts=2)
    for actor in actors[:3]:
        world.die(actor)
    pool.begin()
    assert pool.actors == actors[3:] and len(world.spawned) == 3
    pool.submit(0, "work", 0)
    assert finish(world, pool) == [0]


def test_the_first_death_uncovers_the_other_idle_dead(world):
    actors = world.actors("a", "b", "c", "d")
    pool = world.pool(actors, attempts=2)
    pool.begin()
    for actor in actors[:3]:  # after the round began
        world.die(actor)
    pool.submit(0, "work", 0)
    assert finish(world, pool) == [0]


def test_an_actor_that_cannot_be_reached_is_killed_and_all_it_had_goes_elsewhere(world):
    """Ray says it is unavailable, and it lives: it must neither keep its share nor a call without a deadline."""
    lost, other = world.actors("lost", "other")
    pool = world.pool([lost, other])
    for i in range(4):
        pool.submit(i, "work", i)
    pool.pump()
    world.failed[lost.calls[0]] = ActorDied("unavailable")  # and nothing is ever heard of its second call
    world.kill = world.killed.append
    pool_module.ray.kill = world.killed.append
    assert sorted(finish(world, pool)) == [0, 1, 2, 3]
    assert world.killed == [lost]


def test_replacements_that_came_up_during_a_long_silence_are_all_taken(world):
    actors = world.actors("a", "b", "c")
    pool = world.pool(actors, ready=5)
    for actor in actors[:2]:
        world.die(actor)
    pool.begin()
    world.done.update(("ready", actor.name) for actor in world.spawned)
    world.now = 1000.0  # the driver was training
    pool.submit(0, "work", 0)
    pool.pump()
    assert pool.actors == [actors[2], *world.spawned] and len(world.spawned) == 2


def test_a_driver_that_was_stopped_does_not_blame_its_actors(world):
    actors = world.actors("a", "b", "c")
    pool = world.pool(actors, in_flight=1)
    for i in range(3):
        pool.submit(i, "work", i)
    pool.pump()
    world.done.update(ref for actor in actors for ref in actor.calls)
    world.now = 1000.0
    assert sorted(key for key, _, _ in pool.pump()) == [0, 1, 2] and not world.killed
