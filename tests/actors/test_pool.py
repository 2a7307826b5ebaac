"""Dispatch by itself, over fake actors: balance, limits, deadlines, replacement of the dead."""

import pytest
from fake_pool import finish, submit

from actors import pool as pool_module
from cluster.waits import ActorDied, DeadlineExceeded, ObjectLost


def test_work_goes_to_the_least_busy_actor_and_never_more_than_the_limit(world):
    actors = world.actors("a", "b")
    pool = world.pool(actors)
    submit(pool, *range(6))
    assert pool.pump() == []
    assert [len(actor.calls) for actor in actors] == [2, 2]
    world.done.add(actors[1].calls[0])
    ((key, outputs, summary),) = pool.pump()
    assert (key, summary) == (1, "summary of 1") and outputs == [("big", ("b", 1))]
    assert [len(actor.calls) for actor in actors] == [2, 3]


def test_everything_submitted_comes_back_once(world):
    pool = world.pool(world.actors("a", "b", "c"))
    submit(pool, *range(10))
    assert sorted(finish(world, pool)) == list(range(10))


def test_the_clock_of_a_queued_call_starts_when_its_actor_is_free(world):
    (actor,) = world.actors("a")
    pool = world.pool([actor])
    submit(pool, *range(2))
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
    submit(pool, *range(6))
    pool.pump()
    in_hand = [ref[1] for ref in dead.calls]
    world.die(dead)
    assert sorted(finish(world, pool)) == list(range(6))
    assert sorted(world.lost) == sorted(in_hand)
    assert len(world.spawned) == 1 and pool.actors == [alive, world.spawned[0]]
    assert any("dead is gone" in text for text in world.said)


def test_what_a_dying_actor_had_finished_is_kept(world):
    (dead,) = world.actors("dead")
    pool = world.pool([dead])
    submit(pool, *range(2))
    pool.pump()
    world.done.add(dead.calls[0])
    world.die(dead)
    assert sorted(finish(world, pool)) == [0, 1] and world.lost == [1]


def test_the_last_actor_may_die_too(world):
    (only,) = world.actors("only")
    pool = world.pool([only])
    submit(pool, *range(5))
    pool.pump()
    world.die(only)
    assert sorted(finish(world, pool)) == list(range(5))
    assert pool.actors == world.spawned


def test_a_hung_actor_is_killed_and_its_work_done_elsewhere(world):
    (hung,) = world.actors("hung")
    pool = world.pool([hung])
    submit(pool, 7)
    pool.pump()
    world.now = 11.0
    pool.pump()
    assert world.killed == [hung] and any("run.chunk_seconds=10" in text for text in world.said)
    assert finish(world, pool) == [7]


def test_a_chunk_that_kills_every_actor_ends_the_run_naming_it(world):
    pool = world.pool(world.actors("a"), attempts=3)
    submit(pool, 7)
    with pytest.raises(ActorDied, match=r"\(tried 3 times, run\.chunk_attempts\); remedy 7"):
        for _ in range(20):
            pool.pump()
            for actor in pool.actors:
                world.die(actor)
            world.start_all()
    assert len(world.killed) == 3


def test_a_chunk_that_hangs_every_actor_ends_the_run_with_its_deadline(world):
    pool = world.pool(world.actors("a"), attempts=2)
    submit(pool, 7)
    with pytest.raises(DeadlineExceeded, match=r"sampling 7 .*run\.chunk_seconds"):
        for _ in range(20):
            pool.pump()
            world.now += 11
            world.start_all()


def test_replacements_that_never_start_end_the_run_only_when_nobody_is_left(world):
    dead, alive = world.actors("dead", "alive")
    pool = world.pool([dead, alive], ready=5, attempts=2, seconds=1000)
    submit(pool, *range(4))
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
    submit(pool, 3)
    pool.pump()
    world.failed[actor.calls[0]] = ObjectLost("the node went")
    assert pool.pump() == [] and pool.inputs_lost == [3] and pool.load() == (0, 0) and pool.actors == [actor]


def test_what_remote_code_raises_is_never_tried_again(world):
    (actor,) = world.actors("a")
    pool = world.pool([actor])
    submit(pool, 3)
    pool.pump()
    world.failed[actor.calls[0]] = ZeroDivisionError("data")
    with pytest.raises(ZeroDivisionError):
        pool.pump()
    assert len(actor.calls) == 1 and not world.spawned


def test_work_submitted_first_is_given_first(world):
    (actor,) = world.actors("a")
    pool = world.pool([actor])
    submit(pool, 0, 1)
    pool.submit(2, first=True)
    assert finish(world, pool) == [2, 0, 1]


def test_arguments_are_found_when_an_actor_is_free_also_the_second_time(world):
    (dead,) = world.actors("dead")
    weights = ["old"]
    pool = world.pool([dead], call=lambda actor, key: actor.work.remote(f"{key} {weights[0]}"))
    submit(pool, 0, 1, 2)
    pool.pump()
    weights[0] = "new"
    world.die(dead)
    assert sorted(finish(world, pool)) == [0, 1, 2]
    assert [ref[1] for ref in dead.calls] == ["0 old", "1 old"]
    assert [ref[1] for ref in world.spawned[0].calls] == ["0 new", "1 new", "2 new"]


def test_an_actor_that_cannot_be_reached_is_killed_and_all_it_had_goes_elsewhere(world):
    """Ray says it is unavailable, and it lives: it must neither keep its share nor a call without a deadline."""
    lost, other = world.actors("lost", "other")
    pool = world.pool([lost, other])
    submit(pool, *range(4))
    pool.pump()
    world.failed[lost.calls[0]] = ActorDied("unavailable")  # and nothing is ever heard of its second call
    world.kill = world.killed.append
    pool_module.ray.kill = world.killed.append
    assert sorted(finish(world, pool)) == [0, 1, 2, 3]
    assert world.killed == [lost]


def test_replacements_that_came_up_during_a_long_silence_are_all_taken(world):
    actors = world.actors("a", "b", "c")
    pool = world.pool(actors, ready=5)
    pool.pump()
    world.die(*actors[:2])
    world.now = 1.5
    for _ in range(2):
        pool.pump()
    world.start_all()
    world.now = 1000.0  # the driver was at something else
    submit(pool, 0)
    pool.pump()
    assert pool.actors == [actors[2], *world.spawned] and len(world.spawned) == 2


def test_a_driver_that_was_stopped_does_not_blame_its_actors(world):
    actors = world.actors("a", "b", "c")
    pool = world.pool(actors)
    submit(pool, *range(3))
    pool.pump()
    world.done.update(ref for actor in actors for ref in actor.calls)
    world.now = 1000.0
    assert sorted(key for key, _, _ in pool.pump()) == [0, 1, 2] and not world.killed
    pool.pump()  # the idle are asked, and have answered when it looks again
    world.now = 2000.0
    pool.pump()
    assert not world.killed
