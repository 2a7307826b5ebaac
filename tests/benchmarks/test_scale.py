"""The scale benchmark at a tiny size: what it says was done was done, and what it would not see is seen."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import crowd, protocol, scale
from benchmarks.emulated import Alone, EmulatedSampler, EmulatedScorer, Emulation
from diffusion.snapshot import Snapshot, digest
from diffusion.trajectory import Chunk


@pytest.mark.ray
@pytest.mark.long
def test_many_samplers_some_ranks_and_a_small_store_are_measured_and_nothing_is_lost(tmp_path, capsys):
    file = tmp_path / "figures.json"
    sizes = "--samplers 8 --lanes 4 --seconds 0.05 --ranks 1 2 --gradients 1000 --trajectories 32 --store 80000000"
    assert scale.main(["samplers", "ranks", "spilling", *sizes.split(), "--output", str(file)]) == 0
    report = json.loads(file.read_text())

    (row,) = report["samplers"]["rows"]
    assert row["ideal"] == 8 / 0.05 and 0 < row["chunks_per_second"] < row["ideal"]
    assert row["of_ideal"] == pytest.approx(row["chunks_per_second"] / row["ideal"])
    assert min(row["cpu_seconds"].values()) > 0 and row["driver_bytes"] > 1e7

    alone, two = report["ranks"]["rows"]
    assert (alone["bytes_each_rank_sends"], two["bytes_each_rank_sends"]) == (0, 4000)
    assert two["all_reduce_seconds"] > 0 and report["ranks"]["adapter_sha256"]

    spilled = report["spilling"]
    assert spilled["trained"] == spilled["asked_for"] == 3 * 32
    assert spilled["epoch_bytes"] == 32 * 9 * 4 * 4 * 128 * 128 > 0.9 * spilled["store_bytes"]
    most = spilled["most"]
    assert most["spilled_in_all"] > 0 and most["read_back_in_all"] > 0
    assert 0 < most["on_disk"] <= spilled["bound_bytes"]
    assert max(epoch["epochs_in_work"] for epoch in spilled["epochs"]) <= 2

    assert protocol.scaling((1,), 0.01)["rows"][0]["chunks_per_second"] > 0


def scored(**changes):
    """A chunk as a rank gets it, with some of its arrays changed."""
    work = Emulation(latent=(2, 3, 3), steps=2)
    flat = np.zeros(work.parameters, np.float32)
    chunk = Chunk(0, "train", 0, 0, ("a", "b"), (0, 1))
    made, clean = EmulatedSampler(work).sample(chunk, Snapshot(0, flat, digest(flat)))
    arrays = {name: getattr(made, name).copy() for name in changes}
    for name, index in changes.items():
        arrays[name][index] += 1
    return replace(made, **arrays), EmulatedScorer(work).score(clean)


@pytest.mark.parametrize(
    "changes", [{"states": (1, 2, 0, 0, 0)}, {"model_output": (0, 1, 1, 2, 2)}, {"log_pf": (1, 0)}], ids=str
)
def test_a_number_that_changed_on_its_way_is_seen(changes):
    learner = crowd.ReadingLearner(Emulation(), Alone(), None)
    learner.train_epoch(0, 1.0, [[scored()]], 0.0)
    with pytest.raises(AssertionError, match="chunk 0 of epoch 0: not the numbers"):
        learner.train_epoch(0, 1.0, [[scored(**changes)]], 0.0)


def test_a_mean_that_is_not_the_ranks_mean_is_seen():
    group = SimpleNamespace(rank=1, sum=lambda numbers: numbers)  # alone, so that nothing is averaged
    with pytest.raises(AssertionError, match="rank 1 of 1"):
        crowd.ReducingLearner(Emulation(gradients=5), group, None).train_epoch(0, 1.0, [[scored()]], 0.0)


def test_samplers_share_processes_and_others_do_not():
    spawned = []

    def real(crew, role, shell, options, *arguments):
        spawned.append((role, shell))
        return SimpleNamespace(role=role, number=len(spawned))

    spawn = crowd.spawner(real, 3)
    lanes = [spawn(None, "sampler", crowd.SamplerActor, {}) for _ in range(5)]
    scorer = spawn(None, "scorer", object, {})
    assert spawned == [("sampler", crowd.Lanes)] * 2 + [("scorer", object)] and scorer.role == "scorer"
    assert [(lane.host.number, lane.number) for lane in lanes] == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    assert len(set(lanes)) == 5  # actors/pool.py keeps them as keys
    with pytest.raises(ValueError, match="1 to 16"):
        crowd.spawner(real, 17)


def test_a_disk_that_is_too_small_is_said_before_it_is_filled(monkeypatch):
    folder = SimpleNamespace(path="/")
    runner = SimpleNamespace(crew=SimpleNamespace(session=SimpleNamespace(_folder=folder)))

    class Running:
        def __enter__(self):
            return runner

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(scale, "RayRunner", SimpleNamespace)
    monkeypatch.setattr(scale.protocol, "running", lambda *_: Running())
    monkeypatch.setattr(scale.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(scale.TooSmall, match="40 GB may go to /, 1 are free: fewer steps"):
        scale.spilling(scale.Sizes())
