"""Presets of SDXL, Stable Diffusion 3.5 and FLUX: their plan, and one small epoch over pipelines of the very classes
with random weights; of the embedded flow model one small epoch."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from diffusion import lora_files
from learner.config import load_config
from learner.run import main

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = {"sdxl_pickscore": "tiny_sdxl", "sd35_medium_pickscore": "tiny_sd3", "flux_dev_pickscore": "tiny_flux"}
SMALL = (
    "run.runner=inprocess", "mlflow.enabled=false", "sampler.steps=4", "sampler.chunk_size=4", "prompts.per_prompt=2",
    "train.trajectories=8", "train.epochs=1", "train.updates_per_epoch=1", "evaluation.images=4",
    "flow.widths=[8,16]", "model.pixels=64",
)  # fmt: skip


@pytest.fixture
def settings(request, tmp_path):
    name = request.param
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    options = tiny_models.WRITE["pickscore"](tmp_path)
    assert load_config(CONFIGS / f"{name}.yaml").reward.name == options.pop("name")
    return [
        "--config", str(CONFIGS / f"{name}.yaml"), *SMALL,
        f"model.path={request.getfixturevalue(PRESETS[name])}", f"prompts.path={tmp_path / 'prompts.txt'}",
        f"run.dir={tmp_path / 'run'}", f"reward.weights={options.pop('weights')}",
        f"reward.options={json.dumps(options)}",
    ]  # fmt: skip


@pytest.mark.parametrize("settings", PRESETS, indirect=True)
def test_the_plan(settings, tmp_path, capsys):
    assert main([*settings, "--plan"]) == 0
    said = capsys.readouterr().out
    assert "an epoch: rollout" in said and "transitions trained on" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize("settings", PRESETS, indirect=True)
def test_a_small_epoch_in_bfloat16(settings, tmp_path):
    assert main(settings) == 0
    before, after = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert before["eval_reward_mean"] is not None
    assert np.isfinite([after[key] for key in ("loss", "grad_norm", "drift", "kl")]).all()
    adapter = lora_files.read(tmp_path / "run/checkpoints/latest/lora")
    assert any(bool(b.any()) for _, b in adapter.factors.values())


FLOW = sorted(path.stem for path in CONFIGS.glob("shapes_flow_*.yaml"))
LEAST = [
    *SMALL[:2], "train.epochs=1", "evaluation.images=0", "sampler.steps=4", "learner.ranks=1", "sampler.chunk_size=2",
    "prompts.per_prompt=2",
]  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", FLOW)
def test_a_small_epoch_of_every_preset_of_the_embedded_flow_model(name, tmp_path):
    config = load_config(CONFIGS / f"{name}.yaml")
    settings = [*LEAST, f"train.trajectories={2 * max(8, config.train.updates_per_epoch)}"]
    settings += [f"run.dir={tmp_path / 'run'}", *["flow.warmup_steps=2", "flow.batch=8"] * bool(config.needs.flow)]
    settings += ["objective.window=[0,2]"] * (config.objective.window != "all")
    settings += ["sampler.spread=[1,0.5,0.2,0.1]"] * (config.sampler.kernel == "calibrated")
    assert main(["--config", str(CONFIGS / f"{name}.yaml"), *settings]) == 0
    after = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(after["loss"])
    if config.learner.optimizer != "natural":  # of so few trajectories it may take no step
        assert after["drift"] > 0
