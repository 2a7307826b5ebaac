"""Idle actors of a pool, which are asked whether they live; pools that grow and shrink. Over fake actors."""

from fake_pool import finish, submit


def test_actors_that_died_while_idle_cost_no_chunk_an_attempt(world):
    actors = world.actors("a", "b", "c", "d")
    pool = world.pool(actors, attempts=2)
    pool.pump()
    world.die(*actors[:3])
    for _ in range(2):
        world.now += 1.5
        pool.pump()
    assert pool.actors == actors[3:] and len(world.spawned) == 3 and len(world.said) == 3
    submit(pool, 0)
    assert finish(world, pool) == [0]


def test_the_first_death_uncovers_the_other_idle_dead(world):
    actors = world.actors("a", "b", "c", "d")
    pool = world.pool(actors, attempts=2)
    for _ in range(2):
        pool.pump()  # all are asked, and answer
    world.die(*actors[:3])  # and it is too early to ask again
    submit(pool, 0)
    assert finish(world, pool) == [0] and len(world.spawned) == 3


def test_the_idle_are_asked_now_and_then_and_the_busy_never(world):
    idle, busy = world.actors("idle", "busy")
    pool = world.pool([idle, busy])
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


def test_a_silent_idle_actor_is_replaced_after_its_deadline(world):
    silent, other = world.actors("silent", "other")
    pool = world.pool([silent, other])
    silent.silent = True
    pool.pump()
    world.now = 9.5  # it may have been silent for half a second when it was asked
    pool.pump()
    assert not world.killed
    world.now = 9.6
    pool.pump()
    assert world.killed == [silent] and len(world.spawned) == 1
    (text,) = world.said
    assert "an idle actor for sampling did not answer in run.chunk_seconds=10 s" in text


def test_a_silent_actor_gets_work_only_when_no_other_is_there(world):
    silent, other = world.actors("silent", "other")
    pool = world.pool([silent, other], attempts=1)
    silent.silent = True
    pool.pump()
    world.now = 3.0
    submit(pool, *range(5))
    pool.pump()
    assert silent.calls == [] and len(other.calls) == 2 and pool.load()[0] == 3  # it waits for one that answers
    assert sorted(finish(world, pool)) == [0, 1, 2, 3, 4] and silent.calls == []


def test_if_all_are_silent_work_is_given_all_the_same_and_lost_at_no_cost(world):
    (silent,) = world.actors("silent")
    pool = world.pool([silent], attempts=1)
    silent.silent = True
    pool.pump()
    world.now = 3.0
    submit(pool, 0, 1)
    pool.pump()
    assert [ref[1] for ref in silent.calls] == [0, 1]
    world.now = 11.0  # its calls still had time; its answer had not
    pool.pump()
    assert world.killed == [silent] and sorted(world.lost) == [0, 1]
    assert finish(world, pool) == [0, 1]


def test_an_actor_that_answers_after_all_is_as_good_as_any(world):
    slow, other = world.actors("slow", "other")
    pool = world.pool([slow, other])
    slow.silent = True
    pool.pump()
    world.now = 5.0
    slow.silent = False
    submit(pool, *range(4))
    pool.pump()
    assert len(slow.calls) == 2 and len(other.calls) == 2 and not world.killed


def test_a_bigger_pool_is_filled_up_and_a_smaller_one_keeps_who_works(world):
    a, b = world.actors("a", "b")
    pool = world.pool([a, b])
    pool.resize(4)
    assert len(world.spawned) == 2 and pool.actors == [a, b]
    pool.resize(4)  # those on their way count
    assert len(world.spawned) == 2
    world.start_all()
    pool.pump()
    assert pool.actors == [a, b, *world.spawned]
    submit(pool, 0, 1)
    pool.pump()
    busy = [actor for actor in pool.actors if any("ready" not in ref for ref in actor.calls)]
    pool.resize(2)  # no room for all: the idle go
    assert sorted(actor.name for actor in pool.actors) == sorted(actor.name for actor in busy)
    assert len(world.killed) == 2
    pool.resize(1)  # and then one of the others, whose chunk goes to the last
    assert len(pool.actors) == 1 and len(world.killed) == 3
    assert sorted(finish(world, pool)) == [0, 1]


def test_replacements_beyond_a_smaller_pool_are_called_off(world):
    a, b, c = world.actors("a", "b", "c")
    pool = world.pool([a, b, c])
    pool.pump()
    world.die(b, c)
    world.now = 1.5
    for _ in range(2):
        pool.pump()
    assert pool.actors == [a] and len(world.spawned) == 2
    pool.resize(2)
    assert world.killed[-1] is world.spawned[1]
    world.start_all()
    pool.pump()
    assert pool.actors == [a, world.spawned[0]]


def test_starts_that_failed_are_forgiven_when_the_cluster_has_changed(world):
    (dead,) = world.actors("dead")
    pool = world.pool([dead], ready=5, attempts=2)
    submit(pool, 0)
    pool.pump()
    world.die(dead)
    pool.pump()
    world.now = 6.0
    pool.pump()  # the first replacement was not up in time
    assert len(world.spawned) == 2 and "trying another" in world.said[-1]
    pool.resize(1)
    world.now = 12.0
    pool.pump()  # nor was the second, but a node has joined since
    assert len(world.spawned) == 3
    assert finish(world, pool) == [0]
