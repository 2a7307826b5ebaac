"""Judging on Ray: the same figures with any number of samplers, and with one that dies on the way."""

import json
import shutil

import numpy as np
import pytest
from injected import WITNESS, Fault
from injected import parts as with_fault

from actors import rollouts
from actors.rollouts import evaluation_pools
from benchmarks import emulated
from commands.evaluate import main
from diffusion.snapshot import Snapshot, digest
from diffusion.trajectory import Chunk
from learner import build
from learner.config import load_config
from learner.protocol.chunks import CONTINUED
from learner.protocol.receipts import StaleWeights

pytestmark = pytest.mark.ray
PARTS = emulated.parts(emulated.Emulation())
SNAPSHOT = Snapshot(0, np.ones(64, np.float32), digest(np.ones(64, np.float32)))
CHUNKS = [Chunk(i, "evaluate", CONTINUED, 0, ("a ring", "a star"), (2 * i, 2 * i + 1)) for i in range(6)]


@pytest.fixture
def judge(cluster, monkeypatch):
    """Rewards of CHUNKS by emulated parts on Ray, and what was said."""

    def go(samplers: int, parts=PARTS):
        said, rewards = [], {}
        monkeypatch.setattr(build, "parts", lambda config, own_reward: parts)
        config = load_config(overrides=[f"sampler.actors={samplers}", "reward.actors=1"])
        pools = evaluation_pools(config, said.append)
        try:
            pools.judge(SNAPSHOT, CHUNKS, lambda chunk, scores: rewards.update({chunk.index: scores.rewards[:, -1]}))
        finally:
            pools.close()
        return [rewards[chunk.index].tolist() for chunk in CHUNKS], said

    return go


def test_any_number_of_samplers_gives_the_same_figures_and_one_that_dies_changes_none(judge, tmp_path):
    sampler, scorer = PARTS.sampler(), PARTS.scorer()
    expected = [scorer.score(sampler.sample(chunk, SNAPSHOT)[1]).rewards[:, -1].tolist() for chunk in CHUNKS]
    assert judge(1) == judge(3) == (expected, [])
    figures, said = judge(2, with_fault(PARTS, Fault("sampler", "serving", "kill", str(tmp_path), epoch=-1)))
    assert figures == expected and (tmp_path / WITNESS).exists() and any("replacing the actor" in text for text in said)


def test_weights_that_do_not_arrive_end_it(judge, monkeypatch):
    real, flat = rollouts.put, np.zeros_like(SNAPSHOT.flat)
    monkeypatch.setattr(rollouts, "put", lambda snapshot, what: real(Snapshot(0, flat, digest(flat)), what))
    with pytest.raises(StaleWeights):
        judge(1)


@pytest.mark.long
def test_the_command_judges_on_ray_as_in_process(cluster, finished_run, tmp_path):
    figures = {}
    for name, *settings in (("inprocess",), ("ray", "sampler.actors=2", "reward.actors=1")):
        run = tmp_path / name
        shutil.copytree(finished_run, run)
        arguments = [str(run), "--images", "12", "--cache", str(tmp_path / f"{name}-cache"), f"run.runner={name}"]
        assert main([*arguments, *settings]) == 0
        (file,) = (run / "evaluation").glob("step-*.json")
        figures[name] = json.loads(file.read_text())
    assert figures["ray"] == figures["inprocess"]
