"""The service on its own local Ray cluster: the same bits however many actors."""

import contextlib
import json
from collections import Counter

import psutil
import pytest
import tiny_models
from emulated_run import SETTINGS, lora, outcome, use_emulated_parts
from ray_processes import wait_for

from actors.rollouts import Rollouts
from benchmarks import pipelines
from learner import embeddings
from learner.objectives.by_name import OBJECTIVES
from learner.objectives.needs import NEEDS
from learner.run import main

pytestmark = pytest.mark.ray


def assert_same_bits(settings: list[str], folder, **ways: str) -> None:
    for name, way in {"inprocess": "run.runner=inprocess", **ways}.items():
        assert main([*settings, way, f"run.dir={folder / name}"]) == 0
        assert lora(folder / name) == lora(folder / "inprocess")


def test_three_samplers_give_the_outcome_of_the_inprocess_run(cluster, tmp_path, monkeypatch):
    """Of emulated parts: records, evaluations and ledger too. tests/faults/test_matrix.py has it with 2 ranks."""
    use_emulated_parts(monkeypatch)
    settings = [*SETTINGS, "sampler.actors=3", "learner.ranks=1"]
    for runner in ("inprocess", "ray"):
        assert main([*settings, f"run.runner={runner}", f"run.dir={tmp_path / runner}"]) == 0
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "inprocess")


@pytest.mark.long
def test_every_port_of_a_local_run_is_on_the_loopback(cluster, tmp_path, monkeypatch):
    """Of the driver and all processes below it, while two ranks train; Ray's agents may come up late."""
    use_emulated_parts(monkeypatch)
    real, seen = Rollouts.pause, []

    def listening() -> list[tuple[str, str]]:
        found = []
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                ports = process.net_connections("inet")
                found += [(process.cmdline()[0], port.laddr.ip) for port in ports if port.status == psutil.CONN_LISTEN]
        return found

    def look(self, also=()):
        if self.buffer.closed == 2 and not seen:
            seen.extend(listening())
        real(self, also)

    monkeypatch.setattr(Rollouts, "pause", look)
    wait_for(lambda: {"ray::DashboardAgent", "ray::RuntimeEnvAgent"} <= {name for name, _ in listening()}, 120)
    assert main([*SETTINGS, f"run.dir={tmp_path / 'run'}"]) == 0
    assert {ip.removeprefix("::ffff:") for _, ip in seen} == {"127.0.0.1"}
    names = Counter(name for name, _ in seen)
    assert names["ray::LearnerActor"] == 4 and len(names) >= 6  # a rank's: its worker's, and gloo's


@pytest.mark.long
def test_any_number_of_samplers_gives_the_bits_of_the_inprocess_run(cluster, small_settings, tmp_path):
    assert_same_bits(small_settings, tmp_path, one="sampler.actors=1", three="sampler.actors=3")
    lines = outcome(tmp_path / "three")["metrics"]
    assert [line["epoch"] for line in lines] == [-1, 0, 1]
    assert [line["policy_version"] for line in lines] == [0, 1, 2]
    assert [line["trajectories"] for line in lines] == [0, 8, 8]
    assert all(line["loss"] is not None and line["reward_std"] > 0 for line in lines[1:])
    assert main([*small_settings, "run.runner=inprocess", "run.seed=1", f"run.dir={tmp_path / 'seed'}"]) == 0
    assert lora(tmp_path / "seed") != lora(tmp_path / "three")


@pytest.mark.long
@pytest.mark.parametrize(("kind", "normalise"), [("grpo", "prompt"), ("ddpo", "epoch")])
def test_standardised_parts_give_the_bits_and_shares_of_the_inprocess_run(
    cluster, small_settings, settings_of, tmp_path, kind, normalise
):
    terms = [{"name": "shapes_alignment", "weight": 1}, {"name": "jpeg_incompressibility", "weight": 100}]
    options = json.dumps({"terms": terms, "normalise": normalise})
    settings = [*small_settings, *settings_of(kind), "prompts.per_prompt=4"]
    settings += ["reward.name=weighted_sum", f"reward.options={options}"]
    assert_same_bits(settings, tmp_path, two="sampler.actors=2")
    shares = [
        [[value for key, value in line.items() if key.startswith("reward_share/")] for line in lines]
        for lines in (outcome(tmp_path / name)["metrics"][1:] for name in ("inprocess", "two"))
    ]
    assert shares[0] == shares[1] and [sum(each) for each in shares[0]] == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("model", "kernel"),
    [
        *(pytest.param(model, "ddim", marks=pytest.mark.slow) for model in ("tiny_sdxl", "tiny_sd3")),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("tiny_sd3", "calibrated"), ("tiny_flux", "ddim"))),
    ],
)
def test_other_models_give_the_bits_of_the_inprocess_run(
    cluster, small_settings, tmp_path, request, model, kernel, monkeypatch
):
    """On Ray with prompts that an actor has embedded."""
    monkeypatch.setenv("TRIBUTARY_CACHE", str(tmp_path / "cache"))
    settings = [*small_settings, f"model.path={request.getfixturevalue(model)}", "model.pixels=64"]
    settings += ["objective.last_transition=skip", f"sampler.kernel={kernel}"]
    assert main([*settings, "run.runner=inprocess", f"run.dir={tmp_path / 'inprocess'}"]) == 0
    monkeypatch.setattr(embeddings, "LARGE", 0)
    assert_same_bits(settings, tmp_path, two="sampler.actors=2")
    assert [*(tmp_path / "cache/embeddings").rglob("*.npy")]
    spreads = [json.loads((tmp_path / name / "run.json").read_text()).get("spread") for name in ("inprocess", "two")]
    assert spreads[0] == spreads[1] and (spreads[0] is not None) == (kernel == "calibrated")


@pytest.mark.slow
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_objective_gives_the_same_bits_in_process_and_with_2_samplers(
    cluster, small_settings, settings_of, tmp_path, kind
):
    """With replayed updates where the objective takes them."""
    settings = [*small_settings, *settings_of(kind), "evaluation.images=0"]
    assert_same_bits(settings, tmp_path, two="sampler.actors=2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_objective_trains_the_embedded_flow_model_in_a_window_on_ray(
    cluster, small_settings, settings_of, tmp_path, kind
):
    """Those that are trajectory sums by natural steps, too; all with the nats that the certificate counts."""
    settings = [
        *small_settings, *settings_of(kind), "model.path=models/shapes_flow", "model.text_tokens=16",
        "objective.last_transition=train", "objective.window=[0,1]", "sampler.noise=window", "sampler.adapter=window",
        "objective.log_prob_reduction=sum", "objective.group_size=4",
    ]  # fmt: skip
    assert_same_bits(settings, tmp_path, two="sampler.actors=2")
    moved = outcome(tmp_path / "two")["metrics"][-1]["eval_nats"] > 0
    assert moved or NEEDS[kind].fitted_flow  # whose fit to 16 trajectories may be chance: then nothing moves
    if kind in ("rtb", "rsub", "rdb"):
        natural = [
            "learner.optimizer=natural", "train.trajectories=16", "train.replay_updates=0", "objective.regulariser=0",
            "objective.penalty=squared", "objective.transition_weight=uniform",
        ]  # fmt: skip
        assert_same_bits([*settings, *natural], tmp_path / "natural", two="sampler.actors=2")


@pytest.mark.slow
def test_stable_diffusion_in_bfloat16_with_a_sum_of_rewards_gives_the_same_bits_on_ray(cluster, tmp_path):
    """A paper's preset over tiny networks of its classes."""
    (tmp_path / "prompts.txt").write_text("a fox\na green chair\n")
    hps = tiny_models.write_hpsv2(tmp_path)
    judged = {"name": hps.pop("name"), "weight": 10, "weights": hps.pop("weights"), "options": hps}
    terms = [judged, {"name": "jpeg_compressibility", "weight": 1}]
    settings = [
        "--config", "configs/sd15_hpsv2.yaml", f"model.path={pipelines.build(tmp_path / 'sd15', tiny=True)}",
        f"prompts.path={tmp_path / 'prompts.txt'}", "reward.name=weighted_sum",
        f"reward.options={json.dumps({'terms': terms})}", "sampler.steps=4", "sampler.chunk_size=2",
        "train.trajectories=8", "train.epochs=2", "train.updates_per_epoch=2", "flow.widths=[8,16]", "learner.ranks=1",
        "mlflow.enabled=false", "objective.kind=dag_kl", "evaluation.images=0",
    ]  # fmt: skip
    assert_same_bits(settings, tmp_path, two="sampler.actors=2")
