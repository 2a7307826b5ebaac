"""Judging on Ray: the same figures with 1 and 3 samplers as in process, and with one that dies on the way."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import ray

from actors import crew, rollouts
from actors.shells import SamplerActor
from commands.evaluate import main
from diffusion.snapshot import Snapshot, digest
from learner.run import main as train

pytestmark = [pytest.mark.ray, pytest.mark.long]


class DiesOnce(SamplerActor):
    """At chunk 1; the mark is where evaluation.clip says, which nothing else reads here."""

    def __init__(self, build, shares_gpu):
        super().__init__(build, shares_gpu)
        self.mark = Path(build.args[0].evaluation.clip)

    @ray.method(num_returns=3)
    def sample(self, chunk, snapshot):
        if chunk.index == 1 and not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        return super().sample(chunk, snapshot)


@pytest.fixture(scope="module")
def finished(small_settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = [*small_settings, "run.runner=inprocess", f"run.dir={folder}", "train.epochs=1",
                "learner.learning_rate=0.3", "prompts.path=configs/prompts/shapes_common.txt"]  # fmt: skip
    assert train(settings) == 0
    return folder


@pytest.fixture
def judge(cluster, finished, tmp_path):
    """Judge a copy of the run with these settings and a cache of its own; (exit status, figures)."""

    def go(name, *settings):
        run = tmp_path / name
        shutil.copytree(finished, run)
        status = main([str(run), "--images", "12", "--cache", str(tmp_path / f"{name}-cache"), *settings])
        files = list((run / "evaluation").glob("step-*.json"))
        return status, json.loads(files[0].read_text()) if files else None

    return go


def test_any_number_of_samplers_gives_the_figures_of_the_inprocess_judgement(judge):
    status, expected = judge("inprocess", "run.runner=inprocess")
    assert status == 0
    for samplers in (1, 3):
        settings = ("run.runner=ray", f"sampler.actors={samplers}", "reward.actors=1")
        assert judge(f"{samplers}-samplers", *settings) == (0, expected)


@pytest.mark.slow
def test_a_sampler_that_dies_changes_no_figure(judge, tmp_path, monkeypatch, capfd):
    mark = tmp_path / "died"
    _, expected = judge("unbroken", "run.runner=inprocess", f"evaluation.clip={mark}")
    monkeypatch.setattr(crew, "SamplerActor", DiesOnce)
    settings = ("run.runner=ray", "sampler.actors=2", "reward.actors=1", f"evaluation.clip={mark}")
    assert judge("broken", *settings) == (0, expected)
    assert mark.exists() and "replacing the actor" in capfd.readouterr().out


def test_weights_that_do_not_arrive_end_it(judge, monkeypatch, capfd):
    real = rollouts.put

    def base_only(snapshot, what):
        flat = np.zeros_like(snapshot.flat)
        return real(Snapshot(snapshot.version, flat, digest(flat)), what)

    monkeypatch.setattr(rollouts, "put", base_only)
    status, figures = judge("stale", "run.runner=ray", "sampler.actors=1", "reward.actors=1")
    assert (status, figures) == (1, None) and "StaleWeights" in capfd.readouterr().err
