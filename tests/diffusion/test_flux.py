"""FLUX.1: plain diffusers' own numbers, runs, and LoRA files that plain diffusers opens."""

import json
import shutil

import pytest
import torch
from diffusers import FluxPipeline
from model_runs import draws_by_its_card, goes_on_to_the_bit

from diffusion import lora, lora_files
from diffusion.base_model import BaseModelError, Decoder
from diffusion.open_model import open_base_model
from diffusion.parts import check_parts, latent_shape
from learner.run import main

PROMPTS = ["a red circle on a white background", "a blue square"]
SETTINGS = ["objective.last_transition=skip", "sampler.guidance=3.5", "model.pixels=64", "model.text_tokens=16"]


def plain(path: str) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_pipeline(pipeline: FluxPipeline, latents: torch.Tensor, output: str = "latent") -> torch.Tensor:
    packed = FluxPipeline._pack_latents(latents, len(latents), *latents.shape[1:])
    images = pipeline(
        PROMPTS, num_inference_steps=5, guidance_scale=3.5, height=64, width=64, latents=packed, output_type=output,
        max_sequence_length=16,
    ).images  # fmt: skip
    return FluxPipeline._unpack_latents(images, 64, 64, 4) if output == "latent" else images


@torch.no_grad()
def by_model(model, latents: torch.Tensor) -> torch.Tensor:
    kernel, embeddings, x = model.kernel(5), model.embed(PROMPTS), latents
    for label in kernel.timesteps.tolist():
        t = torch.full((len(x),), label)
        x = kernel.without_noise(model.predict(x, t, embeddings, 3.5)[0], t, x)
    return x


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def test_without_noise_it_draws_what_plain_diffusers_draws(tiny_flux):
    model, pipeline = open_base_model(tiny_flux, pixels=64, text_tokens=16), plain(tiny_flux)
    latents = by_model(model, noise())
    torch.testing.assert_close(latents, by_pipeline(pipeline, noise()), rtol=1e-4, atol=1e-5)
    images = by_pipeline(pipeline, noise(), "pt")
    torch.testing.assert_close(Decoder(tiny_flux)(latents), images, rtol=1e-3, atol=1e-4)
    assert (latents - noise()).abs().mean() > 0.05


@torch.no_grad()
def test_t5_reads_as_much_as_the_pipeline_has_it_read(tiny_flux):
    pipeline, found = plain(tiny_flux), open_base_model(tiny_flux, pixels=64).embed(PROMPTS)
    for prompt, embedding in zip(PROMPTS, found, strict=True):
        rows, pooled, _ = pipeline.encode_prompt(prompt, None)
        torch.testing.assert_close(embedding[:-1], rows[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(embedding[-1, :16], pooled[0], rtol=1e-5, atol=1e-6)


def test_guidance_is_told_to_the_network(tiny_flux):
    model = open_base_model(tiny_flux, pixels=64, text_tokens=16)
    model.kernel(5)
    inputs = noise(), torch.full((2,), 4), model.embed(PROMPTS)
    with torch.no_grad():
        (guided, conditional), (other, _) = model.predict(*inputs, 3.5), model.predict(*inputs, 1.0)
    assert torch.equal(guided, conditional) and not torch.equal(guided, other)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_lora_gives_plain_diffusers_the_samplers_pixels(tiny_flux, tmp_path, targets):
    model = open_base_model(tiny_flux, pixels=64, text_tokens=16)
    model.attach_lora(3, 1.5, seed=1, targets=lora.TARGETS[targets])
    assert any("single_transformer_blocks" in name for name, _ in lora.named(model.unet))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in lora.named(model.unet):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    lora.save_files(model.unet, tmp_path)
    tuned, pipeline = by_model(model, noise()), plain(tiny_flux)
    base = by_pipeline(pipeline, noise())
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(by_pipeline(pipeline, noise()), tuned, rtol=1e-4, atol=1e-4)
    assert (tuned - base).abs().mean() > 0.01
    again = open_base_model(tiny_flux, pixels=64, text_tokens=16)
    lora_files.attach(again, lora_files.read(tmp_path))
    torch.testing.assert_close(by_model(again, noise()), tuned, rtol=0, atol=0)


def test_sizes(tiny_flux, tiny_sd3, tiny_pipeline, tiny_sdxl, ddpm):
    assert latent_shape(tiny_flux) == (4, 128, 128) and latent_shape(tiny_flux, 64) == (4, 16, 16)
    assert latent_shape(tiny_sd3) == (4, 16, 16) and latent_shape(tiny_sd3, 32) == (4, 8, 8)
    assert latent_shape(tiny_pipeline) == (4, 16, 16) and latent_shape(ddpm) == (3, 16, 16)
    assert latent_shape(tiny_sdxl, 48) == (4, 12, 12)
    for path, pixels, said in (
        (tiny_flux, 60, "60 is no multiple of 8"),
        (tiny_pipeline, 60, "60 is no multiple of 16"),
        (tiny_sd3, 256, "256 is more than 128"),
    ):
        with pytest.raises(BaseModelError, match=f"model.pixels: {said}"):
            latent_shape(path, pixels)


CHANGES = [
    ({"in_channels": 64}, "its in_channels is 64, not 16"),
    ({"joint_attention_dim": 64}, "its joint_attention_dim is 64, not 40"),
    ({"pooled_projection_dim": 8}, "its pooled_projection_dim is 8, not 16"),
]


@pytest.mark.parametrize(("changes", "said"), CHANGES)
def test_parts_that_do_not_fit_are_named(tiny_flux, tmp_path, changes, said):
    folder = shutil.copytree(tiny_flux, tmp_path / "changed")
    file = folder / "transformer/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(BaseModelError, match=said):
        check_parts(str(folder))


def test_clean_predictions_are_guided_or_refused(small_settings, tiny_flux, tmp_path, capsys):
    settings = [*small_settings, f"model.path={tiny_flux}", *SETTINGS, f"run.dir={tmp_path / 'run'}"]
    assert main([*settings, "objective.clean_prediction=conditional"]) == 2
    assert "no output without guidance; set it to guided" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dag_db", "rtb", "residual_nabla_db"])
def test_a_run_trains_goes_on_and_is_exported(small_settings, settings_of, tiny_flux, tmp_path, kind):
    common = [*small_settings, *settings_of(kind), f"model.path={tiny_flux}", "run.runner=inprocess", *SETTINGS]
    common += ["prompts.per_prompt=4", "objective.clean_prediction=guided"]
    code = draws_by_its_card(goes_on_to_the_bit(common, tmp_path), tiny_flux, tmp_path)
    assert "FluxPipeline.from_pretrained" in code and "height=64" in code
