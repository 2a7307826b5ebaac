"""Parts that are broken for good: weights that do not arrive, a chunk that no actor survives, a part that cannot be
built. The run ends in one typed line that says so."""

from dataclasses import replace
from functools import partial

import pytest
from broken_parts import Broken, DiesOfChunk1, SamplingDiesOfChunk1, StaleAfterRestart, Unbuildable
from emulated_run import SETTINGS

from actors import rollouts
from benchmarks import emulated
from benchmarks.emulated import Emulation
from diffusion.snapshot import Snapshot, digest
from learner import build
from learner.run import main

pytestmark = [pytest.mark.faults, pytest.mark.ray]


@pytest.fixture
def run(cluster, tmp_path, capfd, monkeypatch):
    """Run on Ray with parts of which some are broken; what was said, once it has ended with status 1."""

    def go(*settings, **parts):
        broken = {name: partial(part, Broken(marks=str(tmp_path))) for name, part in parts.items()}
        monkeypatch.setattr(
            build, "parts", lambda config, own_reward=None: replace(emulated.parts(Emulation()), **broken)
        )
        assert main([*SETTINGS, "learner.ranks=1", f"run.dir={tmp_path / 'run'}", *settings]) == 1
        captured = capfd.readouterr()
        (complaint,) = [line for line in captured.err.splitlines() if line.startswith("learner.run:")]
        return complaint, captured.out

    return go


@pytest.mark.parametrize("named", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_push_of_base_only_weights_ends_the_run(named, run, monkeypatch):
    """Named as what they are, or as the right ones."""
    real = rollouts.put

    def base_only(snapshot, what):
        flat = snapshot.flat * 0 if snapshot.version else snapshot.flat
        return real(Snapshot(snapshot.version, flat, digest(flat) if named else snapshot.sha256), what)

    monkeypatch.setattr(rollouts, "put", base_only)
    complaint, said = run()
    assert "StaleWeights" in complaint and "the new weights did not arrive" in complaint and "epoch 1/3" in said


@pytest.mark.long
def test_a_restarted_sampler_with_stale_weights_ends_the_run(run, tmp_path):
    complaint, said = run("sampler.actors=1", sampler=StaleAfterRestart)
    assert (tmp_path / "died").exists() and (tmp_path / "stale").exists()
    assert "StaleWeights" in complaint and "replacing the actor" in said


@pytest.mark.parametrize(
    ("part", "said", "remedy"),
    [
        ({"scorer": DiesOfChunk1}, "scoring chunk 1 of epoch 0: ", "leave out the one that ends the reward"),
        pytest.param(
            {"sampler": SamplingDiesOfChunk1}, "sampling chunk 1 of epoch 0: ", "a smaller sampler.chunk_size",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_chunk_that_no_actor_survives_ends_the_run_naming_prompts_and_remedy(part, said, remedy, run):
    complaint, _ = run("run.chunk_attempts=2", "reward.on_bad_reward=quarantine", **part)
    assert f"ActorDied: {said}" in complaint and "(tried 2 times, run.chunk_attempts); its prompts: 'a " in complaint
    assert remedy in complaint


@pytest.mark.long
def test_a_part_that_cannot_be_built_is_named_with_its_own_words(run):
    complaint, _ = run(scorer=Unbuildable)
    assert "ActorDied: starting 2 samplers" in complaint and "the reward's own words" in complaint
