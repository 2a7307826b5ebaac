"""Dispatch by itself, over fake actors: balance, limits, deadlines, replacement of the dead, idle ones, growth."""

import pytest
from fake_pool import submit

from actors import pool as pool_module
from cluster.waits import ActorDied, ObjectLost
from diffusion.failures import DeadlineExceeded


def test_work_goes_to_the_least_busy_actor_and_never_more_than_the_limit(world):
    pool, a, b = world.pool("a b", keys=6)
    assert len(a.calls) == len(b.calls) == 2
    world.done.add(b.calls[0])
    assert pool.pump() == [(1, [("big", ("b", 1))], "summary of 1")]
    assert len(a.calls) == 2 and len(b.calls) == 3


def test_a_hung_actor_is_killed_and_its_work_done_elsewhere(world):
    """The clock of a call starts when its actor is free for it."""
    pool, hung = world.pool("hung", keys=2)
    world.now = 9.0
    world.done.add(hung.calls[0])
    assert [key for key, _, _ in pool.pump()] == [0]
    world.now = 18.0  # 18 s after it was handed out, 9 s after it could run
    assert pool.pump() == [] and not world.killed
    world.now = 20.0
    pool.pump()
    assert world.killed == [hung] and "sampling 1 took longer than run.chunk_seconds=10 s" in world.said[-1]
    assert world.finish(pool) == [1]


def test_an_actor_that_does_several_calls_at_once_is_given_one_more_and_each_has_its_deadline(world):
    """One that hangs is not forgotten because others are done meanwhile."""
    pool, hung = world.pool("hung", keys=9, at_once=3)
    assert [key for _, key in hung.calls] == [0, 1, 2, 3]
    for now, done in ((4.0, 1), (8.0, 2), (10.5, 3)):
        world.now = now
        world.done.add(hung.calls[done])
        assert [key for key, _, _ in pool.pump()] == [done]
    assert world.killed == [hung] and "sampling 0 took longer than run.chunk_seconds=10 s" in world.said[-1]
    assert world.finish(pool) == [0, 4, 5, 6, 7, 8]


def test_what_a_dead_actor_had_in_hand_goes_to_others_and_nothing_else(world):
    pool, dead, alive = world.pool("dead alive", keys=6)
    in_hand = [ref[1] for ref in dead.calls]
    world.die(dead)
    assert world.finish(pool) == list(range(6))
    assert sorted(world.lost) == sorted(in_hand)
    assert list(pool.calls) == [alive, *world.spawned] and len(world.spawned) == 1
    assert any("dead is gone: replacing the actor" in text for text in world.said)


def test_what_a_dying_actor_had_finished_is_kept_be_it_the_last_one(world):
    pool, dead = world.pool("dead", keys=2)
    world.done.add(dead.calls[0])
    world.die(dead)
    assert world.finish(pool) == [0, 1] and world.lost == [1] and list(pool.calls) == world.spawned


@pytest.mark.parametrize(("error", "dies"), [(ActorDied, True), (DeadlineExceeded, False)])
def test_a_key_that_kills_or_hangs_every_actor_ends_the_run_naming_it(error, dies, world):
    pool, _ = world.pool("a", keys=1)
    with pytest.raises(error, match=r"\(tried 3 times, run\.chunk_attempts\); remedy 0"):
        for _ in range(20):
            if dies:
                world.die(*pool.calls)
            else:
                world.now += 11
            world.start_all()
            pool.pump()
    assert len(world.killed) == 3


def test_replacements_that_never_start_end_the_run_only_when_nobody_is_left(world):
    pool, dead, alive = world.pool("dead alive", keys=4, ready=5, attempts=2, seconds=1000)
    world.die(dead)
    for _ in range(6):
        world.now += 6
        pool.pump()
    assert len(world.spawned) == 2 and list(pool.calls) == [alive]
    world.die(alive)
    with pytest.raises(DeadlineExceeded, match=r"a replacement for sampling did not answer in run\.ready_seconds=5 s"):
        for _ in range(20):
            world.now += 6
            pool.pump()


def test_work_whose_input_is_gone_is_handed_back_and_what_remote_code_raises_is_never_tried_again(world):
    pool, actor = world.pool("a", keys=1)
    world.failed[actor.calls[0]] = ObjectLost("the node went")
    assert pool.pump() == [] and pool.inputs_lost == [0] and pool.load() == (0, 0) and list(pool.calls) == [actor]
    pool, actor = world.pool("b", keys=1)
    world.failed[actor.calls[0]] = ZeroDivisionError("data")
    with pytest.raises(ZeroDivisionError):
        pool.pump()
    assert len(actor.calls) == 1 and not world.spawned


def test_work_submitted_first_is_given_first(world):
    pool, actor = world.pool("a")
    submit(pool, 0, 1)
    pool.submit(2, first=True)
    assert world.finish(pool) == [0, 1, 2] and [ref[1] for ref in actor.calls] == [2, 0, 1]


def test_arguments_are_found_when_an_actor_is_free_also_the_second_time(world):
    weights = ["old"]
    pool, dead = world.pool("dead", keys=3, call=lambda actor, key: actor.work(f"{key} {weights[0]}"))
    weights[0] = "new"
    world.die(dead)
    assert world.finish(pool) == [0, 1, 2]
    assert [ref[1] for ref in dead.calls] == ["0 old", "1 old"]
    assert [ref[1] for ref in world.spawned[0].calls] == ["0 new", "1 new", "2 new"]


def test_an_actor_that_cannot_be_reached_is_killed_and_all_it_had_goes_elsewhere(world):
    """Ray says it is unavailable, and it lives: it must neither keep its share nor a call without a deadline."""
    pool, lost, _ = world.pool("lost other", keys=4)
    world.failed[lost.calls[0]] = ActorDied("unavailable")  # and nothing is ever heard of its second call
    pool_module.ray.kill = world.killed.append
    assert world.finish(pool) == [0, 1, 2, 3]
    assert world.killed == [lost]


def test_replacements_that_came_up_during_a_long_silence_are_all_taken(world):
    pool, a, b, c = world.pool("a b c", ready=5)
    world.die(a, b)
    world.now = 1.5
    for _ in range(2):
        pool.pump()
    world.start_all()
    world.now = 1000.0  # the driver was at something else
    submit(pool, 0)
    pool.pump()
    assert list(pool.calls) == [c, *world.spawned] and len(world.spawned) == 2


def test_a_driver_that_was_stopped_does_not_blame_its_actors(world):
    pool, *actors = world.pool("a b c", keys=3)
    world.done.update(ref for actor in actors for ref in actor.calls)
    world.now = 1000.0
    assert sorted(key for key, _, _ in pool.pump()) == [0, 1, 2] and not world.killed
    pool.pump()  # the idle are asked, and have answered when it looks again
    world.now = 2000.0
    pool.pump()
    assert not world.killed


@pytest.mark.parametrize("asked_in_time", [True, False])
def test_actors_that_died_while_idle_cost_no_key_an_attempt(asked_in_time, world):
    """The first death that is met uncovers the others."""
    pool, *dead, alive = world.pool("a b c d", attempts=2)
    pool.pump()  # all that were asked have answered
    world.die(*dead)
    for _ in range(2 * asked_in_time):
        world.now += 1.5
        pool.pump()
    assert not asked_in_time or (list(pool.calls) == [alive] and len(world.said) == 3)
    submit(pool, 0)
    assert world.finish(pool) == [0] and len(world.spawned) == 3


def test_the_idle_are_asked_now_and_then_and_the_busy_never(world):
    pool, idle, busy = world.pool("idle busy")
    for _ in range(5):
        pool.pump()
    assert (idle.asked, busy.asked) == (1, 1)
    submit(pool, 0, 1, 2)
    pool.pump()
    world.done.update(idle.calls)
    pool.pump()
    world.now = 9.0  # one of the busy one's calls is done neither
    for _ in range(3):
        pool.pump()
    assert (idle.asked, busy.asked) == (2, 1) and not world.killed


def silenced(world, pool, actor) -> None:
    """From its second question on, at 1 s."""
    pool.pump()
    actor.silent, world.now = True, 1.0
    pool.pump()


def test_a_silent_idle_actor_is_replaced_after_its_deadline(world):
    pool, silent, _ = world.pool("silent other")
    silenced(world, pool, silent)
    world.now = 10.5  # it may have been silent for half a second when it was asked
    pool.pump()
    assert not world.killed
    world.now = 10.6
    pool.pump()
    assert world.killed == [silent] and len(world.spawned) == 1
    (text,) = world.said
    assert "an idle actor for sampling did not answer in run.chunk_seconds=10 s" in text


def test_a_silent_actor_gets_work_only_when_no_other_is_there(world):
    pool, silent, other = world.pool("silent other", attempts=1)
    silenced(world, pool, silent)
    world.now = 4.0
    submit(pool, *range(5))
    pool.pump()
    assert silent.calls == [] and len(other.calls) == 2 and pool.load() == (3, 2)  # it waits for one that answers
    assert world.finish(pool) == [0, 1, 2, 3, 4] and silent.calls == []


def test_if_all_are_silent_work_is_given_all_the_same_and_lost_at_no_cost(world):
    pool, silent = world.pool("silent", attempts=1)
    silenced(world, pool, silent)
    world.now = 4.0
    submit(pool, 0, 1)
    pool.pump()
    assert [ref[1] for ref in silent.calls] == [0, 1]
    world.now = 12.0  # its calls still had time; its answer had not
    pool.pump()
    assert world.killed == [silent] and sorted(world.lost) == [0, 1]
    assert world.finish(pool) == [0, 1]


def test_an_actor_that_answers_after_all_is_as_good_as_any(world):
    pool, slow, other = world.pool("slow other")
    silenced(world, pool, slow)
    world.now = 5.0
    slow.silent = False
    submit(pool, *range(4))
    pool.pump()
    assert len(slow.calls) == 2 and len(other.calls) == 2 and not world.killed


def test_a_bigger_pool_is_filled_up_and_a_smaller_one_keeps_who_works(world):
    pool, a, b = world.pool("a b")
    pool.resize(4)
    assert len(world.spawned) == 2 and list(pool.calls) == [a, b]
    pool.resize(4)  # those on their way count
    assert len(world.spawned) == 2
    world.start_all()
    pool.pump()
    assert list(pool.calls) == [a, b, *world.spawned]
    submit(pool, 0, 1)
    pool.pump()
    busy = [actor for actor in pool.calls if actor.calls]
    pool.resize(2)  # no room for all: the idle go
    assert set(pool.calls) == set(busy) and len(world.killed) == 2
    pool.resize(1)  # and then one of the others, whose key goes to the last
    assert len(pool.calls) == 1 and len(world.killed) == 3
    assert world.finish(pool) == [0, 1]


def test_replacements_beyond_a_smaller_pool_are_called_off(world):
    pool, a, *dead = world.pool("a b c")
    world.die(*dead)
    world.now = 1.5
    for _ in range(2):
        pool.pump()
    assert list(pool.calls) == [a] and len(world.spawned) == 2
    pool.resize(2)
    assert world.killed[-1] is world.spawned[1]
    world.start_all()
    pool.pump()
    assert list(pool.calls) == [a, world.spawned[0]]


def test_starts_that_failed_are_forgiven_when_the_cluster_has_changed(world):
    pool, dead = world.pool("dead", keys=1, ready=5, attempts=2)
    world.die(dead)
    pool.pump()
    world.now = 6.0
    pool.pump()  # the first replacement was not up in time
    assert len(world.spawned) == 2 and "trying another" in world.said[-1]
    pool.resize(1)
    world.now = 12.0
    pool.pump()  # nor was the second, but a node has joined since
    assert len(world.spawned) == 3
    assert world.finish(pool) == [0]
