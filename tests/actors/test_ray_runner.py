"""The service on its own local Ray cluster: the same bits however many actors."""

import json

import pyarrow.parquet as pq
import pytest
import tiny_models

from benchmarks import pipelines
from learner.objectives.by_name import OBJECTIVES
from learner.run import main

pytestmark = pytest.mark.ray


def lora(folder) -> list[bytes]:
    return [file.read_bytes() for file in sorted((folder / "checkpoints/latest/lora").iterdir())]


@pytest.fixture(scope="module")
def unbroken(small_settings, tmp_path_factory):
    """Two epochs in process: what every other way to run must reproduce."""
    folder = tmp_path_factory.mktemp("runs") / "inprocess"
    assert main([*small_settings, "run.runner=inprocess", f"run.dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize("samplers", [pytest.param(1, marks=pytest.mark.long), 3])
def test_any_number_of_samplers_gives_the_bits_of_the_inprocess_run(
    cluster, unbroken, small_settings, tmp_path, samplers
):
    assert main([*small_settings, f"sampler.actors={samplers}", f"run.dir={tmp_path / 'run'}"]) == 0
    assert lora(tmp_path / "run") == lora(unbroken)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [-1, 0, 1]
    assert [line["policy_version"] for line in lines] == [0, 1, 2]
    assert [line["trajectories"] for line in lines] == [0, 8, 8]
    assert all(line["loss"] is not None and line["reward_std"] > 0 for line in lines[1:])


def assert_same_bits(settings: list[str], folder, ways: dict[str, str]) -> None:
    for name, way in ways.items():
        assert main([*settings, "evaluation.images=0", way, f"run.dir={folder / name}"]) == 0
    first, *others = (lora(folder / name) for name in ways)
    assert all(other == first for other in others)


@pytest.mark.slow
def test_reward_gradients_give_the_same_bits_on_ray(cluster, small_settings, settings_of, tmp_path):
    ways = {"inprocess": "run.runner=inprocess", "three": "sampler.actors=3"}
    assert_same_bits([*small_settings, *settings_of("residual_nabla_db")], tmp_path, ways)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_objective_gives_the_same_bits_in_process_and_with_1_and_3_samplers(
    cluster, small_settings, settings_of, tmp_path, kind
):
    """With replayed updates where the objective takes them."""
    ways = {"inprocess": "run.runner=inprocess", "one": "sampler.actors=1", "three": "sampler.actors=3"}
    assert_same_bits([*small_settings, *settings_of(kind)], tmp_path, ways)


@pytest.mark.slow
def test_stable_diffusion_in_bfloat16_with_a_sum_of_rewards_gives_the_same_bits_on_ray(cluster, tmp_path):
    """A paper's preset over tiny networks of its classes; each reward of the sum is recorded alone."""
    (tmp_path / "prompts.txt").write_text("a fox\na green chair\n")
    hps = tiny_models.write_hpsv2(tmp_path)
    judged = {"name": hps.pop("name"), "weight": 10, "weights": hps.pop("weights"), "options": hps}
    terms = [judged, {"name": "jpeg_compressibility", "weight": 1}]
    settings = [
        "--config", "configs/sd15_hpsv2.yaml", f"model.path={pipelines.build(tmp_path / 'sd15', tiny=True)}",
        f"prompts.path={tmp_path / 'prompts.txt'}", "reward.name=weighted_sum",
        f"reward.options={json.dumps({'terms': terms})}", "sampler.steps=4", "sampler.chunk_size=2",
        "train.trajectories=8", "train.epochs=2", "train.updates_per_epoch=2", "flow.widths=[8,16]", "learner.ranks=1",
        "mlflow.enabled=false", "objective.kind=dag_kl",
    ]  # fmt: skip
    assert_same_bits(settings, tmp_path, {"inprocess": "run.runner=inprocess", "two": "sampler.actors=2"})
    lines = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    rows = pq.read_table(tmp_path / "two/trajectories/epoch-000001.parquet").to_pylist()
    for row in rows:
        parts = dict(row["reward_parts"])
        assert row["reward"] == pytest.approx(10 * parts["hpsv2"] + parts["jpeg_compressibility"], abs=1e-5)
    mean = sum(dict(row["reward_parts"])["hpsv2"] for row in rows) / len(rows)
    assert lines[-1]["reward_mean/hpsv2"] == pytest.approx(mean, rel=1e-5)


def test_another_seed_gives_another_lora(unbroken, small_settings, tmp_path):
    assert main([*small_settings, "run.runner=inprocess", "run.seed=1", f"run.dir={tmp_path / 'run'}"]) == 0
    assert lora(tmp_path / "run") != lora(unbroken)
