"""Stable Diffusion XL: plain diffusers' own numbers, runs, and LoRA files that plain diffusers opens."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from model_runs import draws_by_its_card, goes_on_to_the_bit

from commands.export import main as export
from diffusion import lora, lora_files
from diffusion.base_model import BaseModelError, Decoder
from diffusion.open_model import open_base_model
from diffusion.parts import check_parts
from learner.run import main

PROMPTS = ["a red circle on a white background", "a blue square"]


def plain(path: str) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(path)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_pipeline(pipeline, latents: torch.Tensor, output: str = "latent", guidance: float = 2.0) -> torch.Tensor:
    return pipeline(
        PROMPTS, num_inference_steps=5, guidance_scale=guidance, eta=0.0, latents=latents, output_type=output
    ).images


@torch.no_grad()
def by_model(model, latents: torch.Tensor, guidance: float = 2.0) -> torch.Tensor:
    kernel, embeddings, x = model.kernel(5), model.embed(PROMPTS), latents
    for step in kernel.timesteps.tolist():
        t = torch.full((len(x),), step)
        x = kernel.without_noise(model.predict(x, t, embeddings, guidance)[0], t, x)
    return x


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("zeros", [True, False])
def test_without_noise_it_draws_what_plain_diffusers_draws(tiny_sdxl, tmp_path, zeros):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": zeros}))
    model, pipeline = open_base_model(str(folder)), plain(str(folder))
    assert bool(model.embed([""]).any()) != zeros
    latents = by_model(model, noise())
    torch.testing.assert_close(latents, by_pipeline(pipeline, noise()), rtol=1e-4, atol=1e-4)
    images = by_pipeline(pipeline, noise(), "pt")
    torch.testing.assert_close(Decoder(str(folder))(latents), images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_lora_gives_plain_diffusers_the_samplers_pixels(tiny_sdxl, tmp_path, targets):
    model = open_base_model(tiny_sdxl)
    model.attach_lora(3, 1.5, seed=1, targets=lora.TARGETS[targets])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in lora.named(model.unet):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    lora.save_files(model.unet, tmp_path)
    tuned = by_model(model, noise())
    pipeline = plain(tiny_sdxl)
    base = by_pipeline(pipeline, noise())
    pipeline.load_lora_weights(tmp_path, weight_name=lora.DIFFUSERS_FILE)
    torch.testing.assert_close(by_pipeline(pipeline, noise()), tuned, rtol=1e-4, atol=1e-4)
    assert (tuned - base).abs().mean() > 0.01
    read, again = lora_files.read(tmp_path), open_base_model(tiny_sdxl)
    lora_files.attach(again, read)
    torch.testing.assert_close(by_model(again, noise()), tuned, rtol=0, atol=0)


CHANGES = [
    ({"cross_attention_dim": 16}, "its cross_attention_dim is 16, not 32"),
    ({"projection_class_embeddings_input_dim": 80}, "its projection_class_embeddings_input_dim is 80, not 64"),
    ({"addition_embed_type": None}, "its addition_embed_type is None, not text_time"),
]


@pytest.mark.parametrize(("changes", "said"), CHANGES)
def test_parts_that_do_not_fit_are_named(tiny_sdxl, tmp_path, changes, said):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "changed")
    file = folder / "unet/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(BaseModelError, match=said):
        check_parts(str(folder))


@pytest.mark.parametrize("kind", ["dag_db", "rtb", "residual_nabla_db"])
def test_a_run_trains_goes_on_and_is_exported(small_settings, settings_of, tiny_sdxl, tmp_path, kind):
    common = [*small_settings, *settings_of(kind), f"model.path={tiny_sdxl}", "run.runner=inprocess"]
    common += ["sampler.guidance=2", "prompts.per_prompt=4"]
    code = draws_by_its_card(goes_on_to_the_bit(common, tmp_path), tiny_sdxl, tmp_path)
    assert "StableDiffusionXLPipeline.from_pretrained" in code


def test_no_whole_pipeline_is_fused(small_settings, tiny_sdxl, tmp_path, capsys):
    run = tmp_path / "run"
    settings = [f"model.path={tiny_sdxl}", "run.runner=inprocess", f"run.dir={run}", "train.epochs=1"]
    assert main([*small_settings, *settings]) == 0
    assert export([str(run), "--format", "fused", "--out", str(tmp_path / "out")]) == 2
    assert "use --format diffusers" in capsys.readouterr().err
