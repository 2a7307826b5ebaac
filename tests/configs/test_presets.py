"""Every preset for Stable Diffusion 1.5, one small epoch over a pipeline of the same classes with random weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import StableDiffusionPipeline

from benchmarks import pipelines
from diffusion import lora
from learner import build
from learner.config import load_config
from learner.experience import Experience
from learner.protocol.chunks import training_chunks
from learner.run import main
from records.checkpoint import MANIFEST

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = (
    "run.runner=inprocess", "mlflow.enabled=false", "sampler.steps=4", "sampler.chunk_size=4", "train.trajectories=8",
    "train.epochs=1", "train.updates_per_epoch=1", "evaluation.images=4", "flow.widths=[8,16]", "objective.beta=1",
    "objective.anneal_fraction=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> str:
    return str(pipelines.build(tmp_path_factory.mktemp("sd15"), tiny=True))


@pytest.fixture(scope="module")
def taesd(tmp_path_factory) -> str:
    return str(pipelines.build_tiny_decoder(tmp_path_factory.mktemp("taesd"), tiny=True))


@pytest.fixture
def settings_of_preset(sd15, tmp_path):
    """Arguments for a preset as it is but for its size, and for weights and prompts that are not here. The run is in
    tmp_path/run."""

    def make(name: str) -> list[str]:
        (tmp_path / "prompts.txt").write_text("a fox\na green chair\n")
        settings = ["--config", str(CONFIGS / f"{name}.yaml"), *SMALL, f"model.path={sd15}"]
        settings += [f"prompts.path={tmp_path / 'prompts.txt'}", f"run.dir={tmp_path / 'run'}"]
        reward = load_config(CONFIGS / f"{name}.yaml").reward.name
        if reward in tiny_models.WRITE:
            options = tiny_models.WRITE[reward](tmp_path)
            assert options.pop("name") == reward
            settings += [f"reward.weights={options.pop('weights')}", f"reward.options={json.dumps(options)}"]
        return settings

    return make


PRESETS = sorted(path.stem for path in CONFIGS.glob("sd15_*.yaml"))
CASES = [
    (name, kind) for name in PRESETS for kind in ("residual_nabla_db",) * ("nabla" in name) or ("dag_db", "dag_kl")
]


@pytest.mark.parametrize("name", [PRESETS[0], *(pytest.param(name, marks=pytest.mark.long) for name in PRESETS[1:])])
def test_the_plan_of_every_preset(name, settings_of_preset, tmp_path, capsys):
    assert main([*settings_of_preset(name), "--plan"]) == 0
    said = capsys.readouterr().out
    assert "an epoch: rollout" in said and "transitions trained on" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_small_epoch_in_bfloat16(name, kind, settings_of_preset, sd15, tmp_path):
    assert load_config(CONFIGS / f"{name}.yaml").model.dtype == "bfloat16"
    assert main([*settings_of_preset(name), f"objective.kind={kind}"]) == 0
    before, after = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert before["eval_reward_mean"] != after["eval_reward_mean"]
    assert np.isfinite([after[key] for key in ("loss", "grad_norm", "drift", "kl")]).all()
    if kind == "dag_kl":
        assert after["updates"][0]["clipped"] == 0  # against the learner's own log p_F
    saved = tmp_path / "run/checkpoints/latest"
    manifest = json.loads((saved / MANIFEST).read_text())
    assert manifest["batch_sizes"]["micro_batch"] == 8 and manifest["batch_sizes"]["score"] in (16, 32)
    pipe = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None)
    pipe.load_lora_weights(str(saved / "lora"))
    trained = torch.load(saved / "learner.pt", weights_only=True)["adapter"].numpy()
    assert np.abs(trained).max() > 0
    loaded = np.concatenate([p.detach().float().numpy().ravel() for _, p in lora.named(pipe.unet)])
    np.testing.assert_array_equal(loaded, trained.astype(np.float32))


def test_a_just_sampled_trajectorys_ratio_is_one_in_bfloat16(settings_of_preset):
    """Recomputed by the learner, in micro-batches of another shape than the rollout's."""
    _, preset, *settings = settings_of_preset("sd15_compressibility")
    config = load_config(preset, [*settings, "objective.kind=dag_kl", "learner.micro_batch=3"])
    sampler, learner = build.build_sampler(config), build.build_learner(config)
    flat = learner.published.flat + 0.05 * np.random.default_rng(0).standard_normal(learner.published.flat.shape)
    snapshot = lora.Snapshot(1, flat.astype(np.float32), lora.digest(flat.astype(np.float32)))
    lora.load(learner.model.unet, snapshot.flat)
    assert next(p for p in learner.model.unet.parameters() if not p.requires_grad).dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in learner.policy_parameters)
    chunk = training_chunks(config, ["a fox", "a green chair"], 0)[0]
    trajectories, _ = sampler.sample(chunk, snapshot)
    one = Experience(trajectories, build.build_scorer(config).score(sampler.sample(chunk, snapshot)[1]))
    learner._prepare([one], 1.0)
    for batch in learner._micro_batches(one, 1.0):
        per_dimension = (batch.prepared["log_pf_old"] - batch.log_pf_old) / batch.x[0].numel()
        assert per_dimension.abs().max() < 1e-5
        _, parts = learner.loss(batch, 1.0)
        assert parts["clipped"] == 0


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_tiny_decoder_and_half_precision_states_serve_a_preset(precision, settings_of_preset, taesd, tmp_path):
    settings = ["objective.forward_looking_decoder=tiny", f"model.tiny_decoder={taesd}"]
    settings += ["objective.forward_looking_from=2", f"sampler.state_precision={precision}"]
    assert main([*settings_of_preset("sd15_incompressibility"), *settings]) == 0
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["loss"])


def test_a_tiny_decoder_that_is_not_there_or_of_another_kind_is_named(settings_of_preset, taesd, tmp_path, capsys):
    settings = [*settings_of_preset("sd15_incompressibility"), "objective.forward_looking_decoder=tiny"]
    assert main([*settings, "model.tiny_decoder=./nowhere"]) == 2
    assert "model.tiny_decoder: no such folder: nowhere" in capsys.readouterr().err
    assert main([*settings, "model.path=models/shapes", f"model.tiny_decoder={taesd}"]) == 2
    assert "decodes (channels, magnification) (4, 8), the VAE of models/shapes (4, 4)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
