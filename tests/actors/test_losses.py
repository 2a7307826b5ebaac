"""What the runner does about things that went with their node, over pools that only write down what they are given."""

from types import SimpleNamespace

import pytest

from actors import ray_runner as module
from actors.learner_group import RanksLost
from actors.ray_runner import RayRunner
from cluster.waits import ObjectLost
from diffusion.trajectory import Verdict
from learner.config import Config
from learner.protocol.buffer import Work


class FakePool:
    """Finishes what it is given at once: sampling with what `sampled` says of a key, scoring likewise."""

    def __init__(self, answer) -> None:
        self.answer, self.queue, self.inputs_lost, self.asked = answer, [], [], []
        self.waiting_on: list = []

    def submit(self, key, method, arguments, first=False) -> None:
        self.queue.append(key)

    def pump(self):
        keys, self.queue = self.queue, []
        self.asked += keys
        return [(key, *self.answer(key)) for key in keys]


class FakePipeline:
    """One evaluation chunk."""

    def __init__(self, key) -> None:
        chunk = SimpleNamespace(purpose=key[0], epoch=key[1], index=key[2], where="the evaluation set", prompts=("a",))
        self.one, self.key, self.lost = Work(chunk), key, 0

    def add_evaluation(self, chunks) -> None: ...

    def work(self, key) -> Work:
        assert key == self.key
        return self.one

    def sampled(self, key, receipt, trajectories, clean) -> None:
        self.one.clean = clean

    def scored(self, key, verdict, scores) -> None:
        self.one.scores = scores

    def lose(self, key) -> None:
        self.lost += 1
        self.one = Work(self.one.chunk)

    def counts(self, purpose, epoch) -> tuple[int, int]:
        return int(self.one.scores is not None), 1

    def evaluation(self) -> list[Work]:
        return [self.one]

    def take_evaluation(self) -> list[Work]:
        return [self.one]


class Quiet:
    """A stand-in for the metrics: whatever is told, nothing comes of it."""

    def __getattr__(self, name):
        return lambda *_: self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


KEY = ("evaluate", 0, 0)


@pytest.fixture
def runner(monkeypatch):
    """A runner in the middle of its work; scores are numbered as they are made."""
    runner = RayRunner.__new__(RayRunner)
    made = iter(range(100))
    runner.config, runner.metrics, runner.pipeline = Config(), Quiet(), FakePipeline(KEY)
    runner.said = []
    runner.hooks = SimpleNamespace(say=runner.said.append, turn=lambda: None, progress=lambda *_: None)
    runner._made_again, runner.batch_sizes = module.Counter(), {"score": 4}
    runner._looked = 0.0
    runner._group = SimpleNamespace(look=lambda: None)
    runner.samplers = FakePool(lambda key: (["trajectories", "clean"], "receipt"))
    runner.scorers = FakePool(lambda key: ([f"scores {next(made)}"], Verdict((0.0,), (), 0.0)))
    runner._apart = module.Apart(runner.scorers, 4)
    monkeypatch.setattr(module, "key_of", lambda chunk: KEY)
    monkeypatch.setattr(RayRunner, "_wait", lambda *_: None)
    monkeypatch.setattr(RayRunner, "_follow_nodes", lambda self: None)
    return runner


def test_evaluation_images_that_went_with_their_node_are_made_again(runner, monkeypatch):
    def get(ref, *_):
        if ref == "scores 0":
            raise ObjectLost("evaluation images of chunk 0: gone")
        return f"the {ref}"

    monkeypatch.setattr(module, "get", get)
    assert runner.evaluate([runner.pipeline.one.chunk]) == ["the scores 1"]
    assert runner.samplers.asked == [KEY, KEY] and runner.pipeline.lost == 1
    assert runner.said == ["evaluation images of chunk 0: gone: will be made again"]


def test_images_that_are_lost_every_time_end_the_run(runner, monkeypatch):
    def get(*_):
        raise ObjectLost("gone")

    monkeypatch.setattr(module, "get", get)
    with pytest.raises(ObjectLost, match=r"chunk 0 of epoch 0 was made and lost 3 times \(run\.chunk_attempts\)"):
        runner.evaluate([runner.pipeline.one.chunk])


@pytest.mark.parametrize("pool", ["samplers", "scorers"])
def test_a_chunk_whose_inputs_are_gone_is_sampled_again(pool, runner):
    """The weights for a sampler, or the clean predictions for a reward actor."""
    getattr(runner, pool).inputs_lost.append(KEY)
    runner._pump()
    assert runner.samplers.queue == [KEY] and runner.pipeline.lost == 1
    runner._pump()
    assert runner.samplers.asked == [KEY]


def test_one_lost_row_has_the_whole_chunk_made_again_once(runner):
    runner._apart.begin(KEY, 2, "clean")
    rows, runner.scorers.queue = runner.scorers.queue, []
    runner.scorers.inputs_lost += rows
    runner._pump()
    assert runner.samplers.queue == [KEY] and runner.pipeline.lost == 1


def test_ranks_that_cannot_start_are_said_as_what_they_died_of(monkeypatch):
    cause, closed = ObjectLost("the checkpoint does not fit"), []

    def start(*_):
        raise RanksLost(cause)

    monkeypatch.setattr(RayRunner, "_start", start)
    monkeypatch.setattr(RayRunner, "close", lambda self: closed.append(self))
    monkeypatch.setattr(module, "Session", lambda *_: None)
    monkeypatch.setattr(module, "Metrics", lambda *_: None)
    with pytest.raises(ObjectLost) as raised:
        RayRunner(Config())
    assert raised.value is cause and closed
