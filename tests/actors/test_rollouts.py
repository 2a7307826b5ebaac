"""What is done about things that went with their node or their actor, over pools that only write down what they get."""

from types import SimpleNamespace

import pytest

from actors import ray_runner, rollouts
from actors.learner_group import RanksLost
from actors.ray_runner import RayRunner
from actors.rollouts import Rollouts
from cluster.waits import ObjectLost
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, Receipt, Verdict
from learner.config import Config
from learner.protocol.buffer import Buffer
from learner.protocol.ledger import Ledger

CHUNK = Chunk(0, "evaluate", 0, 0, ("a ring", "a star", "a ring"), (0, 1, 2))
SNAPSHOT = Snapshot(3, None, "adapter")


class FakePool:
    """Finishes what it is given at once, with what `answer` says."""

    def __init__(self, answer) -> None:
        self.answer, self.queue, self.inputs_lost, self.asked, self.remedies = answer, [], [], [], []
        self.waiting_on: list = []

    def submit(self, key, method, arguments, remedy="", first=False) -> None:
        self.queue.append((key, arguments))
        self.remedies.append(remedy)

    def pump(self):
        given, self.queue = self.queue, []
        self.asked += [(key, *arguments()) for key, arguments in given]
        return [(key, *self.answer()) for key, _ in given]


class Quiet:
    """A stand-in for the metrics: whatever is told, nothing comes of it."""

    def __getattr__(self, name):
        return lambda *_: self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def made(monkeypatch):
    """Rollouts in the middle of their work, of one evaluation chunk; scores are numbered as they are made."""
    numbers = iter(range(100))
    receipt = Receipt(3, "adapter", (0.0,), (0.0,), "here", 0.0)
    pools = {
        "samplers": FakePool(lambda: (["trajectories", "clean"], receipt)),
        "scorers": FakePool(lambda: ([f"scores {next(numbers)}"], Verdict((0.0,), (), 0.0))),
    }
    said: list[str] = []
    crew = SimpleNamespace(metrics=Quiet(), say=said.append, config=Config(), samplers="samplers", scorers="scorers")
    crew.pool = lambda role, lost: pools[role]
    made = Rollouts(crew, Buffer(lambda epoch: [], range(0), 0, Ledger()), 4)
    made.said = said
    monkeypatch.setattr(rollouts, "put", lambda snapshot, what: "weights")
    made.publish(SNAPSHOT)
    made.buffer.add_evaluation([CHUNK])
    return made


def evaluate(made) -> list:
    """Until the chunk is scored, as the runners do."""
    made.submit([CHUNK])
    for _ in range(20):
        made.pump()
        if evaluated := list(made.evaluated()):
            return evaluated
    raise AssertionError("never scored")


def test_evaluation_images_that_went_with_their_node_are_made_again(made, monkeypatch):
    def get(ref, seconds, what, setting):
        if ref == "scores 0":
            raise ObjectLost(f"{what}: gone")
        return f"the {ref}"

    monkeypatch.setattr(rollouts, "get", get)
    assert evaluate(made) == [(CHUNK, "the scores 1")]
    assert made.samplers.asked == [(CHUNK.key, CHUNK, "weights")] * 2
    assert made.said == ["images of chunk 0 of the evaluation set: gone: will be made again"]
    assert not made.buffer.works


def test_images_that_are_lost_every_time_end_the_run(made, monkeypatch):
    def get(*_):
        raise ObjectLost("gone")

    monkeypatch.setattr(rollouts, "get", get)
    words = r"chunk 0 of the evaluation set was made and lost 3 times \(run\.chunk_attempts\)"
    with pytest.raises(ObjectLost, match=words):
        evaluate(made)


@pytest.mark.parametrize("pool", ["samplers", "scorers"])
def test_a_chunk_whose_inputs_are_gone_is_sampled_again(pool, made):
    """The weights for a sampler, or the clean predictions for a reward actor."""
    getattr(made, pool).inputs_lost.append(CHUNK.key)
    made.pump()
    assert [key for key, _ in made.samplers.queue] == [CHUNK.key] and made.made_again[CHUNK.key] == 1
    made.pump()
    assert made.samplers.asked == [(CHUNK.key, CHUNK, "weights")]


def test_whoever_costs_every_actor_its_process_is_named_with_its_prompts_and_the_remedy(made):
    """Which ends the error that the pool raises."""
    made.submit([CHUNK])
    made.pump()
    (sampling,), (scoring,) = made.samplers.remedies, made.scorers.remedies
    assert sampling.startswith("its prompts: 'a ring', 'a star'; ") and "sampler.chunk_size" in sampling
    assert scoring.startswith("its prompts: 'a ring', 'a star'; ") and "reward.on_bad_reward=quarantine" in scoring


def test_ranks_that_cannot_start_are_said_as_what_they_died_of(monkeypatch):
    cause, closed = ObjectLost("the checkpoint does not fit"), []

    def start(*_):
        raise RanksLost(cause)

    monkeypatch.setattr(RayRunner, "_start", start)
    monkeypatch.setattr(RayRunner, "close", lambda self: closed.append(self))
    monkeypatch.setattr(ray_runner, "Session", lambda *_: None)
    with pytest.raises(ObjectLost) as raised:
        RayRunner(Config())
    assert raised.value is cause and closed
