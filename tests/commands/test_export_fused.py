"""Fused pipelines sample as the run did, whatever scheduler the base model ships; and all of models without text."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from safetensors import safe_open

from commands import export
from diffusion import lora, lora_files
from diffusion.base_model import BaseModel, load_kernel
from learner.config import load_config
from learner.run import main as run_main
from reports import model_card


def require_steps(scheduler, kernel, **eta) -> None:
    scheduler.set_timesteps(kernel.num_steps)
    assert scheduler.timesteps.tolist() == kernel.timesteps.tolist()
    for t in scheduler.timesteps:
        output, x, noise = torch.randn(3, 1, 4, 8, 8)
        theirs = scheduler.step(output, t, x, variance_noise=noise, **eta).prev_sample
        assert torch.allclose(theirs, kernel.sample(output, t.expand(1), x, noise), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("grid", "shipped"),
    [
        ("ddim", PNDMScheduler(skip_prk_steps=True, beta_schedule="scaled_linear")),  # as Stable Diffusion 1.5
        ("ddim", DDIMScheduler(beta_schedule="scaled_linear")),  # clips, and ends at an alpha of 1
        ("dpm_solver", PNDMScheduler(skip_prk_steps=True, beta_schedule="scaled_linear")),
    ],
)
def test_a_fused_pipeline_takes_the_runs_steps(tiny_pipeline, tmp_path, grid, shipped):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_pipeline, base)
    shipped.save_pretrained(base / "scheduler")
    index = json.loads((base / "model_index.json").read_text()) | {"scheduler": ["diffusers", type(shipped).__name__]}
    (base / "model_index.json").write_text(json.dumps(index))
    model = BaseModel(str(base))
    model.attach_lora(2, 3, seed=0)
    lora.save_files(model.unet, tmp_path / "lora")
    config = load_config(overrides=[f"model.path={base}", f"sampler.grid={grid}"])
    export.write(str(out), export._fused(config, lora_files.read(tmp_path / "lora")), {})
    scheduler, kernel = StableDiffusionPipeline.from_pretrained(out).scheduler, model.kernel(10, grid=grid)
    require_steps(scheduler, kernel, **({"eta": 1.0} if grid == "ddim" else {}))
    kind = type(scheduler).__name__
    for form in ("fused", "diffusers"):
        assert (f"{kind}.from_config" in model_card.usage(config, form, "x")) == (form != "fused")


def test_a_base_model_without_its_safety_checker_exports_as_it_trains(tiny_pipeline, tmp_path, capsys):
    """Under names and with files that transformers 4 reads too: tests/diffusion/test_older_libraries.py."""
    base = shutil.copytree(tiny_pipeline, tmp_path / "base")
    parts = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    parts |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    index = json.loads((base / "model_index.json").read_text()) | parts
    (base / "model_index.json").write_text(json.dumps(index))
    model = BaseModel(str(base))
    model.attach_lora(2, 3, seed=0)
    lora.save_files(model.unet, tmp_path / "lora")
    content = export._fused(load_config(overrides=[f"model.path={base}"]), lora_files.read(tmp_path / "lora"))
    assert f"warning: {base} lacks one of safety_checker" in capsys.readouterr().err
    assert json.loads(content["model_index.json"])["safety_checker"] == [None, None]
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt"} < set(content)
    assert all(
        name.startswith("text_model.") for name in safetensors.torch.load(content["text_encoder/model.safetensors"])
    )


@pytest.fixture(scope="module")
def without_text(ddpm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = (
        "prompts.path=null", "sampler.guidance=1", "sampler.steps=4", "sampler.chunk_size=4", "prompts.per_prompt=4",
        "train.trajectories=4", "train.epochs=1", "train.updates_per_epoch=1", "evaluation.images=0", "lora.rank=2",
        "flow.warmup_steps=0", "flow.fit_steps=0", "flow.widths=[8,16]", "flow.stem_stride=1", "mlflow.enabled=false",
        "lora.alpha=3", "learner.learning_rate=0.05", "run.runner=inprocess", "reward.name=jpeg_incompressibility",
    )  # fmt: skip
    assert run_main([*settings, f"model.path={ddpm}", f"run.dir={folder}"]) == 0
    return folder


def test_plain_diffusers_draws_the_same_from_both(without_text, ddpm, refused):
    for form in ("diffusers", "kohya"):
        message = refused("export", without_text, "--format", form)
        assert "takes no text" in message and "use --format peft or fused" in message
    for form in ("peft", "fused"):
        assert export.main([str(without_text), "--format", form]) == 0
    peft, fused = without_text / "export/peft", without_text / "export/fused"
    adapter = lora_files.read(peft)
    assert (adapter.rank, adapter.alpha) == (2, 3)
    with safe_open(str(peft / lora.PEFT_FILES[1]), "pt") as opened:
        assert opened.metadata()["tributary.adapter_sha256"] == adapter.sha256
    _, front, page = (peft / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "unconditional-image-generation" and "takes no text" in page
    # Both as their cards say, at one seed: the same picture, and another than the base model's.
    drawn = []
    for place in (peft, fused, None):
        code = re.search("```python\n(.*?)```", (place or peft).joinpath("README.md").read_text(), re.S)[1]
        code = code.replace(f'"{Path(ddpm).name}"', f'"{ddpm}"').replace("path/to/this/folder", str(place))
        code = code.replace("batch_size=1", "output_type='np', generator=torch.manual_seed(3)").rsplit("[0]", 1)[0]
        if place is None:
            code = re.sub("pipe.unet = .*", "", code)
        names = {"torch": torch}
        exec(code.replace("\npipe(", "\nimages = pipe("), names)
        drawn.append(names["images"])
    require_steps(DDIMPipeline.from_pretrained(fused).scheduler, load_kernel(ddpm, 4, 1.0), eta=1.0)
    assert np.abs(drawn[0] - drawn[1]).max() < 2e-3 < np.abs(drawn[0] - drawn[2]).max()
