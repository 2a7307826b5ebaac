"""The ranks as one, over fake actors: who gets which chunks, whose failure counts, and by when."""

from types import SimpleNamespace

import numpy as np
import pytest

from actors import learner_group as module
from actors import pool, shells
from actors.learner_group import LearnerGroup, RanksLost
from cluster.waits import ActorDied, ObjectLost
from diffusion.failures import DeadlineExceeded
from diffusion.snapshot import Snapshot
from learner.config import load_config
from learner.process_group import GroupBroken
from learner.protocol.receipts import RanksDiverged
from learner.protocol.runner import Training


class FakeRank:
    """Answers at once with what it is told to, an exception included; `silent` methods are never answered."""

    def __init__(self, rank: int) -> None:
        self.rank, self.silent, self.killed, self.calls = rank, set(), False, []
        self.answers = {
            "ready": f"tcp://{rank}", "start": (Snapshot(0, np.zeros(1), "first"), (1, 2, 2)),
            "fit_micro_batch": 8 - rank, "fetch": [], "progress": (0, 16), "state_files": {f"rank-{rank}": b"state"},
            "train_epoch": (Training({}, [], (rank,)), "hash", Snapshot(1, np.zeros(1), "hash") if rank == 0 else None),
        }  # fmt: skip

    def __getattr__(self, name: str):
        def remote(*arguments):
            self.calls.append((name, *arguments))
            return (self, name, len(self.calls))

        return SimpleNamespace(remote=remote)


class World:
    def __init__(self) -> None:
        self.now, self.spawned, self.silent, self.meanwhile = 0.0, [], {}, 0

    def group(self, ranks=2, meanwhile=None, trained=lambda done, total: None, gpus=0, stale=0) -> LearnerGroup:
        limits = ("run.train_seconds=5", "run.chunk_seconds=3", "run.ready_seconds=10")
        settings = [*limits, "train.updates_per_epoch=2", f"train.max_staleness={stale}"]
        crew = SimpleNamespace(
            config=load_config(overrides=settings), room=None, spawn=self.spawn,
            placement=SimpleNamespace(ranks=SimpleNamespace(count=ranks, gpus=gpus)),
        )  # fmt: skip
        return LearnerGroup(crew, "build", meanwhile or self.wait, trained)

    def spawn(self, role, shell, options, build, rank, *_) -> FakeRank:
        self.spawned.append(FakeRank(rank))
        self.spawned[-1].silent |= self.silent.get(rank, set())
        return self.spawned[-1]

    def wait(self, refs) -> None:
        self.meanwhile += 1
        self.now += 0.5

    def done(self, refs, seconds=0.0):
        return [ref for ref in refs if ref[1] not in ref[0].silent]

    def get(self, ref, *_):
        answer = ref[0].answers[ref[1]]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def world(monkeypatch):
    world = World()
    for either in (module, pool):
        monkeypatch.setattr(either, "done", world.done)
        monkeypatch.setattr(either, "get", world.get)
    monkeypatch.setattr(module, "put", lambda value, what: value)
    monkeypatch.setattr(module, "in_group", lambda placement, room: [{}] * placement.ranks.count)
    monkeypatch.setattr(module.ray, "kill", lambda actor: setattr(actor, "killed", True))
    monkeypatch.setattr(module.time, "monotonic", lambda: world.now)
    return world


@pytest.fixture
def group(world):
    group = world.group()
    group.start({"a": b"file"}, deadline=10.0)
    return group


def called(rank: FakeRank, name: str) -> tuple:
    return next(call[1:] for call in rank.calls if call[0] == name)


def test_all_are_up_before_any_is_told_to_meet_the_others(world):
    world.silent[1], asked_to_start = {"ready"}, []

    def wait(refs):
        world.wait(refs)
        asked_to_start.append(any(call[0] == "start" for rank in world.spawned for call in rank.calls))
        world.spawned[1].silent.clear()

    held, latent = world.group(meanwhile=wait).start(None, deadline=10.0)
    assert asked_to_start == [False] and held.sha256 == "first" and latent == (1, 2, 2)
    assert [called(rank, "start") for rank in world.spawned] == [("tcp://0", 5.0, None)] * 2


PAIRS = [(f"t{i}", f"s{i}") for i in range(8)]


def test_every_update_is_the_same_chunks_whatever_the_ranks_and_gives_all_accounts_and_files(group, world):
    """What is lost is named by its place in the epoch."""
    assert group.fetch(1, PAIRS) == []
    first, second = (called(rank, "fetch")[1] for rank in world.spawned)
    assert first == [[PAIRS[0], PAIRS[2]], [PAIRS[4], PAIRS[6]]]
    assert second == [[PAIRS[1], PAIRS[3]], [PAIRS[5], PAIRS[7]]]
    world.spawned[0].answers["fetch"], world.spawned[1].answers["fetch"] = [(0, 1)], [(1, 0)]
    assert group.fetch(1, PAIRS) == [2, 5]
    trainings, snapshot, files = group.train(1, 0.5, 0.8)
    assert [training.trajectory_ids for training in trainings] == [(0,), (1,)] and snapshot.version == 1
    assert files == {"rank-0": b"state", "rank-1": b"state"}


def test_how_far_training_is_is_asked_of_the_first_rank_until_all_have_answered(world):
    told, steps = [], iter([(4, 16), ActorDied("its node is gone"), (12, 16)])

    def wait(refs):
        world.wait(refs)
        world.spawned[0].answers["progress"] = next(steps, None)
        if world.spawned[0].answers["progress"] is None:
            world.spawned[1].silent.clear()

    group = world.group(meanwhile=wait, trained=lambda done, total: told.append((done, total)))
    group.start(None, deadline=10.0)
    world.spawned[0].answers["progress"], world.spawned[1].silent = (0, 16), {"train_epoch"}
    group.train(1, 0.5, 0.0)
    assert told == [(0, 1), (4, 16), (12, 16)]
    assert all(call[0] != "progress" for call in world.spawned[1].calls)


@pytest.mark.parametrize("failure", [ActorDied("gone"), GroupBroken("a peer is gone"), ObjectLost("with its node")])
@pytest.mark.parametrize(("rank", "method"), [(0, "train_epoch"), (1, "train_epoch"), (1, "state_files")])
def test_the_first_failure_is_the_groups_while_the_other_rank_still_waits(rank, method, failure, group, world):
    world.spawned[rank].answers[method] = failure
    world.spawned[1 - rank].silent = {method}
    with pytest.raises(RanksLost) as lost:
        group.train(1, 0.5, 0.8)
    assert lost.value.args == (failure,) and world.now == 0.0


def test_what_others_fail_with_meanwhile_is_not_the_groups(world):
    def wait(refs):
        raise ActorDied("no sampler is left")

    group = world.group(1, meanwhile=wait)
    group.start(None, deadline=10.0)
    world.spawned[0].silent = {"train_epoch"}
    with pytest.raises(ActorDied, match="no sampler"):
        group.train(1, 0.5, 0.8)


@pytest.mark.parametrize("others", [{}, {"train_epoch": GroupBroken("closed by peer")}])
def test_a_defect_or_another_adapter_is_no_loss_and_comes_before_the_group_that_it_broke(others, group, world):
    training, _, _ = world.spawned[1].answers["train_epoch"]
    world.spawned[1].answers["train_epoch"] = (training, "another", None)
    with pytest.raises(RanksDiverged):
        group.train(1, 0.5, 0.8)
    world.spawned[0].answers.update(others)
    world.spawned[1].answers["train_epoch"] = ZeroDivisionError("why")
    with pytest.raises(ZeroDivisionError, match="why"):
        group.train(1, 0.5, 0.8)


@pytest.mark.parametrize(
    ("method", "words", "seconds"),
    [
        ("train_epoch", r"training of epoch 1 took longer than run\.train_seconds=5 s", 5.0),
        ("fetch", r"fetching epoch 1 took longer than run\.chunk_seconds=3 s", 3.0),
    ],
)
def test_a_rank_that_does_not_answer_is_given_its_deadline_and_no_more(method, words, seconds, group, world):
    world.spawned[1].silent = {method}
    with pytest.raises(RanksLost, match=words):
        group.fetch(1, PAIRS)
        group.train(1, 0.5, 0.8)
    assert seconds < world.now <= seconds + 0.5


def look(group, world, seconds: float) -> None:
    """As the driver does while others work."""
    until = world.now + seconds
    while world.now < until:
        group.look()
        world.now += 0.25


def test_an_idle_rank_that_dies_is_noticed(group, world):
    look(group, world, 5.0)
    world.spawned[1].answers["ready"], then = ActorDied("gone"), world.now
    with pytest.raises(RanksLost, match="gone"):
        look(group, world, 5.0)
    assert world.now - then <= 1.0


@pytest.mark.parametrize("told", [False, True])
def test_an_idle_rank_that_is_silent_is_noticed_at_its_deadline(told, group, world):
    """What it is told to do meanwhile gives it no more time."""
    look(group, world, 5.0)
    world.spawned[0].silent, then = {"ready", "fetch"}, world.now
    with pytest.raises(RanksLost, match=r"an idle learner rank did not answer in run\.chunk_seconds=3 s"):
        look(group, world, 2.0 if told else 9.0)
        group.fetch(1, PAIRS)
    assert 2.5 < world.now - then <= 4.0  # PING_SECONDS after the last answer it is asked, 2.5 s later it is lost


def test_a_group_that_starts_anew_is_of_other_actors_and_asks_those(group, world):
    look(group, world, 0.5)
    world.spawned[0].silent = {"ready"}
    look(group, world, 1.0)
    old = list(world.spawned)
    group.start(None, deadline=world.now + 10.0)
    look(group, world, 20.0)
    assert all(rank.killed for rank in old) and not any(rank.killed for rank in world.spawned[2:])


def fetching(monkeypatch, answers: dict, now: list[float]):
    """A rank whose objects are found, lost or late: seconds that each takes, or an error."""

    def get(refs, seconds, *_):
        for ref in refs:
            if isinstance(answers[ref], Exception):
                raise answers[ref]
            if answers[ref] > seconds:
                now[0] += seconds
                raise DeadlineExceeded("late")
            now[0] += answers[ref]
        return [f"the {ref}" for ref in refs]

    monkeypatch.setattr(shells, "get", get)
    monkeypatch.setattr(shells.time, "monotonic", lambda: now[0])
    return shells.LearnerActor(lambda files: None, 0, 1, whole_gpu=True)


def test_a_rank_says_which_of_its_objects_are_lost(monkeypatch):
    answers = dict.fromkeys(("t0", "s0", "s1", "t2"), 0.0) | dict.fromkeys(("t1", "s2"), ObjectLost("gone"))
    actor, pairs = fetching(monkeypatch, answers, [0.0]), [[("t0", "s0")], [("t1", "s1"), ("t2", "s2")]]
    assert actor.fetch(1, pairs, 3.0) == [(1, 0), (1, 1)]
    answers.update(t1=0.0, s2=0.0)
    assert actor.fetch(1, pairs, 3.0) == []
    assert actor.fetched[1][1] == ("the t2", "the s2")


def test_what_is_slow_beside_what_is_lost_costs_one_deadline_not_one_each(monkeypatch):
    """The driver gives the group up at the deadline: the answer comes a little before."""
    now = [0.0]
    answers = {f"{kind}{i}": 9.0 for kind in "ts" for i in range(4)} | {"t0": ObjectLost("gone"), "t3": 0.0, "s3": 0.0}
    actor = fetching(monkeypatch, answers, now)
    assert actor.fetch(1, [[(f"t{i}", f"s{i}") for i in range(4)]], 3.0) == [(0, 0), (0, 1), (0, 2)]
    assert now[0] == pytest.approx(2.7)


@pytest.mark.parametrize(
    ("ranks", "gpus", "stale", "share"),
    [
        (1, 1.0, 0, 1.0),
        (1, 1 / 3, 0, 1.0),
        (1, 1 / 3, 1, 1 / 3),
        (2, 1 / 4, 0, 1 / 2),
        (2, 1 / 4, 1, 1 / 4),
        (2, 1.0, 1, 1.0),
    ],
)
def test_ranks_have_all_free_memory_of_a_shared_gpu_only_while_the_others_rest(world, ranks, gpus, stale, share):
    group = world.group(ranks, gpus=gpus, stale=stale)
    group.start(None, 10.0)
    assert group.fit_micro_batch(10.0) == 9 - ranks  # the least of the ranks'
    assert [rank.calls[-1] for rank in world.spawned] == [("fit_micro_batch", share)] * ranks
