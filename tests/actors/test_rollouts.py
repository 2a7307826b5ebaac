"""What is done about things that went with their node or their actor, over pools that only write down what they get."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from actors import ray_runner, rollouts
from actors.learner_group import RanksLost
from actors.ray_runner import RayRunner
from actors.rollouts import Rollouts
from cluster.waits import ObjectLost
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, Receipt, Verdict
from learner.config import Config

CHUNK = Chunk(0, "evaluate", 0, 0, ("a ring", "a star", "a ring"), (0, 1, 2))
RECEIPT = Receipt(3, "adapter", (0.0,), (0.0,), "here", 0.0)


class FakePool:
    """Finishes what it is given at once; scores are numbered as they are made."""

    def __init__(self, doing, count, spawn, call, config, failed, lost, remedy, at_once) -> None:
        self.call, self.remedy, self.scoring = call, remedy, doing == "scoring"
        self.queue, self.inputs_lost, self.asked, self.waiting_on = [], [], [], []

    def submit(self, key, first=False) -> None:
        self.queue.append(key)

    def pump(self):
        keys, self.queue = self.queue, []
        actor = SimpleNamespace(sample=SimpleNamespace(remote=self.do), score=SimpleNamespace(remote=self.do))
        return [(key, *self.call(actor, key)) for key in keys]

    def do(self, *arguments):
        self.asked.append(arguments)
        if self.scoring:
            return [f"scores {len(self.asked) - 1}"], Verdict((0.0,), (), 0.0)
        return ["trajectories", "clean"], RECEIPT


@pytest.fixture
def made(monkeypatch):
    """Rollouts in the middle of their work, of one evaluation chunk."""
    share = SimpleNamespace(gpus=0, count=0, spread={})
    crew = SimpleNamespace(
        config=Config(), placement=SimpleNamespace(samplers=share, scorers=share), metrics=Mock(), said=[],
        spawn=print, failed=print, description="", close=print,
    )  # fmt: skip
    crew.say = crew.said.append
    monkeypatch.setattr(rollouts, "Pool", FakePool)
    monkeypatch.setattr(rollouts, "put", lambda snapshot, what: "weights")
    made = Rollouts(crew, SimpleNamespace(sampler=None, scorer=None))
    made.publish(Snapshot(3, None, "adapter"))
    made.buffer.add([CHUNK])
    return made


def evaluated(made) -> list:
    """Until the chunk is scored."""
    scored = []
    made.evaluate([CHUNK], lambda *chunk_and_scores: scored.append(chunk_and_scores), made.pump)
    return scored


def test_evaluation_images_that_went_with_their_node_are_made_again(made, monkeypatch):
    def get(ref, seconds, what, setting):
        if ref == "scores 0":
            raise ObjectLost(f"{what}: gone")
        return f"the {ref}"

    monkeypatch.setattr(rollouts, "get", get)
    assert evaluated(made) == [(CHUNK, "the scores 1")]
    assert made.samplers.asked == [(CHUNK, "weights")] * 2
    assert made.crew.said == ["images of chunk 0 of the evaluation set: gone: will be made again"]
    assert not made.buffer.works


def test_images_that_are_lost_every_time_end_the_run(made, monkeypatch):
    monkeypatch.setattr(rollouts, "get", Mock(side_effect=ObjectLost("gone")))
    words = r"chunk 0 of the evaluation set was made and lost 3 times \(run\.chunk_attempts\)"
    with pytest.raises(ObjectLost, match=words):
        evaluated(made)


@pytest.mark.parametrize("pool", ["samplers", "scorers"])
def test_a_chunk_whose_inputs_are_gone_is_sampled_again(pool, made):
    """The weights for a sampler, or the clean predictions for a reward actor."""
    getattr(made, pool).inputs_lost.append(CHUNK.key)
    made.pump()
    assert made.samplers.queue == [CHUNK.key] and made.made_again[CHUNK.key] == 1
    made.pump()
    assert made.samplers.asked == [(CHUNK, "weights")] and made.scorers.asked == [("clean", made.score_batch)]


def test_whoever_costs_every_actor_its_process_is_named_with_its_prompts_and_the_remedy(made):
    """Which ends the error that the pool raises."""
    sampling, scoring = made.samplers.remedy(CHUNK.key), made.scorers.remedy(CHUNK.key)
    assert sampling.startswith("its prompts: 'a ring', 'a star'; ") and "sampler.chunk_size" in sampling
    assert scoring.startswith("its prompts: 'a ring', 'a star'; ") and "reward.on_bad_reward=quarantine" in scoring


def test_ranks_that_cannot_start_are_said_as_what_they_died_of(monkeypatch):
    cause, crew = ObjectLost("the checkpoint does not fit"), Mock()
    monkeypatch.setattr(RayRunner, "_start", Mock(side_effect=RanksLost(cause)))
    monkeypatch.setattr(ray_runner, "Crew", lambda *_: crew)
    with pytest.raises(ObjectLost) as raised:
        RayRunner(Config())
    assert raised.value is cause and crew.close.called
