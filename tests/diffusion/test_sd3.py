"""Stable Diffusion 3: plain diffusers' own numbers, runs, and LoRA files that plain diffusers opens."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from model_runs import goes_on_to_the_bit

from diffusion import lora, lora_files
from diffusion import noise as noise_module
from diffusion.base_model import BaseModelError, Decoder
from diffusion.flow_kernels import FlowKernel
from diffusion.open_model import open_base_model
from diffusion.parts import check_parts
from diffusion.rollout import Sampler
from diffusion.settings import RolloutSettings
from diffusion.trajectory import Chunk
from learner.run import main

PROMPTS = ["a red circle on a white background", "a blue square"]
SETTINGS = ["objective.last_transition=skip", "sampler.guidance=2", "model.text_tokens=16"]


def plain(path: str) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None)


def by_pipeline(pipeline: StableDiffusion3Pipeline, latents: torch.Tensor, output: str = "latent") -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS, num_inference_steps=6, guidance_scale=2.0, height=64, width=64, latents=latents, output_type=output,
        max_sequence_length=16,
    ).images  # fmt: skip


@torch.no_grad()
def by_model(model, latents: torch.Tensor) -> torch.Tensor:
    kernel = model.kernel(6)
    embeddings, x = model.embed(PROMPTS), latents
    for label in kernel.timesteps.tolist():
        t = torch.full((len(x),), label)
        x = kernel.without_noise(model.predict(x, t, embeddings, 2.0)[0], t, x)
    return x


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_without_noise_it_draws_what_plain_diffusers_draws(tiny_sd3):
    model = open_base_model(tiny_sd3, text_tokens=16)
    pipeline, start = plain(tiny_sd3), noise()
    latents = by_model(model, start)
    torch.testing.assert_close(latents, by_pipeline(pipeline, start), rtol=1e-4, atol=1e-5)
    images = by_pipeline(pipeline, start, "pt")
    torch.testing.assert_close(Decoder(tiny_sd3)(latents), images, rtol=1e-3, atol=1e-4)
    assert (latents - start).abs().mean() > 0.05


def test_a_shift_of_the_latents_is_the_vaes(tiny_sd3, tmp_path):
    folder = shutil.copytree(tiny_sd3, tmp_path / "shifted")
    file = folder / "vae/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift_factor": 0.4, "scaling_factor": 1.5}))
    images = by_pipeline(plain(str(folder)), noise(), "pt")
    ours = Decoder(str(folder))(by_model(open_base_model(str(folder), text_tokens=16), noise()))
    torch.testing.assert_close(ours, images, rtol=1e-3, atol=1e-4)


def test_the_last_step_has_no_density_and_the_others_have(tiny_sd3):
    model = open_base_model(tiny_sd3, text_tokens=16)
    model.attach_lora(2, 2, seed=0)
    sampler = Sampler(
        model, RolloutSettings(5, 2.0, end=4, terminal=4, forward_looking="none", clean_prediction="guided")
    )
    chunk = Chunk(0, "train", 0, 0, tuple(PROMPTS), (0, 1))
    trajectories, clean = sampler.sample(chunk, lora.snapshot(model.unet, 0))
    assert isinstance(sampler.kernel, FlowKernel) and sampler.kernel.noisy_steps == 4
    assert trajectories.timesteps.tolist() == [5, 4, 3, 2, 1]
    assert (trajectories.log_pf[:, :4] != 0).all() and (trajectories.log_pf[:, 4] == 0).all()
    # The terminal state's clean prediction is the image.
    latents = {(row, step): latent for row, step, latent in zip(clean.row, clean.step, clean.latents, strict=True)}
    torch.testing.assert_close(torch.from_numpy(latents[0, 4]), torch.from_numpy(latents[0, 5]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_lora_gives_plain_diffusers_the_samplers_pixels(tiny_sd3, tmp_path, targets):
    model = open_base_model(tiny_sd3, text_tokens=16)
    model.attach_lora(3, 1.5, seed=1, targets=lora.TARGETS[targets])
    names = {name.split(".")[-4] for name, _ in lora.named(model.unet)}
    assert {"to_q", "add_q_proj", "to_add_out"} <= names
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in lora.named(model.unet):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    lora.save_files(model.unet, tmp_path)
    tuned = by_model(model, noise())
    pipeline = plain(tiny_sd3)
    base = by_pipeline(pipeline, noise())
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(by_pipeline(pipeline, noise()), tuned, rtol=1e-4, atol=1e-4)
    assert (tuned - base).abs().mean() > 0.01
    read = lora_files.read(tmp_path)
    assert (read.rank, read.alpha) == (3, 1.5)
    again = open_base_model(tiny_sd3, text_tokens=16)
    lora_files.attach(again, read)
    torch.testing.assert_close(by_model(again, noise()), tuned, rtol=0, atol=0)


def test_embeddings_are_the_pipelines_own_whatever_the_batch(tiny_sd3):
    model, pipeline = open_base_model(tiny_sd3), plain(tiny_sd3)
    rows, _, pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    found = model.embed(PROMPTS)
    torch.testing.assert_close(found[:, :-1], rows, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[:, -1, :32], pooled, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.embed(PROMPTS[1:]), found[1:])


def test_how_much_of_a_prompt_t5_reads_can_be_set(tiny_sd3):
    few, plain_model = open_base_model(tiny_sd3, text_tokens=8), plain(tiny_sd3)
    rows = plain_model.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=8)[0]
    torch.testing.assert_close(few.embed(PROMPTS)[:, :-1], rows, rtol=1e-5, atol=1e-6)


CHANGES = [
    ("transformer/config.json", {"in_channels": 16, "out_channels": 16}, "its in_channels is 16, not 4"),
    ("transformer/config.json", {"pooled_projection_dim": 64}, "its pooled_projection_dim is 64, not 32"),
    ("transformer/config.json", {"joint_attention_dim": 24}, "its joint_attention_dim is 24, less than 32 of CLIP"),
    ("transformer/config.json", {"num_layers": 3}, "its config.json says"),
    ("text_encoder_2/config.json", {"intermediate_size": 64}, "text_encoder_2/model.safetensors has"),
    ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "not FlowMatchEulerDiscreteScheduler"),
]


@pytest.mark.parametrize(("file", "changes", "said"), CHANGES)
def test_parts_that_do_not_fit_are_named(tiny_sd3, tmp_path, file, changes, said):
    folder = shutil.copytree(tiny_sd3, tmp_path / "changed")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **changes}))
    with pytest.raises(BaseModelError, match=said):
        check_parts(str(folder))
        open_base_model(str(folder), text_tokens=16).kernel(5)


def test_a_run_that_would_train_the_last_step_is_told_what_to_set(small_settings, tiny_sd3, tmp_path, capsys):
    settings = [*small_settings, f"model.path={tiny_sd3}", "run.runner=inprocess"]
    assert main([*settings, "objective.last_transition=train", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "set it to skip" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["dag_db", "rtb", "residual_nabla_db", "grpo"])
def test_a_run_trains_and_goes_on(small_settings, settings_of, tiny_sd3, tmp_path, kind):
    common = [*small_settings, *settings_of(kind), f"model.path={tiny_sd3}", "run.runner=inprocess", *SETTINGS]
    if kind in ("rtb", "grpo"):
        common += ["prompts.per_prompt=4"]
    assert lora_files.read(goes_on_to_the_bit(common, tmp_path) / "checkpoints/latest/lora").factors


def test_a_window_that_is_measured_ends_before_the_last_step(small_settings, tiny_sd3, tmp_path):
    settings = [*small_settings, f"model.path={tiny_sd3}", "run.runner=inprocess", f"run.dir={tmp_path / 'run'}"]
    own = ["objective.kind=rtb", "objective.last_transition=train", "objective.window=auto", "prompts.per_prompt=4"]
    free = ["flow.warmup_steps=0", "flow.fit_steps=0", "sampler.guidance=2", "model.text_tokens=16"]
    assert main([*settings, *own, *free]) == 0
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] is not None


@pytest.fixture(scope="module")
def run(small_settings, tiny_sd3, tmp_path_factory) -> Path:
    """A run whose LoRA changes pictures enough to tell."""
    folder = tmp_path_factory.mktemp("runs") / "sd3"
    settings = [f"model.path={tiny_sd3}", "run.runner=inprocess", f"run.dir={folder}", *SETTINGS]
    assert main([*small_settings, *settings, "learner.learning_rate=0.05", "evaluation.images=8"]) == 0
    return folder


@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("kernel", ["ddim", "calibrated", "flow_grpo"])
def test_the_cards_own_code_draws_the_samplers_pixels(run, tiny_sd3, tmp_path, monkeypatch, kernel, window):
    """Its scheduler's noise is replaced by the sampler's."""
    from commands.export import main as export
    from learner.config import read_config
    from reports import model_card

    assert export([str(run), "--format", "diffusers", "--out", str(tmp_path / "out")]) == 0
    assert "WithNoise" in (tmp_path / "out/README.md").read_text()
    more = ["objective.last_transition=train", "objective.window=[0, 1]"] if window else []
    settings = ["sampler.noise=window", "sampler.adapter=window"] if window else []
    own = [f"sampler.kernel={kernel}", "sampler.spread=[0.9, 0.7, 0.5, 0.3]", "sampler.eta=0.8"]
    config, faults = read_config(run / "config.yaml", [*more, *settings, *own])
    assert not faults
    model = open_base_model(tiny_sd3, text_tokens=16)
    lora_files.attach(model, lora_files.read(tmp_path / "out"))
    sampler = Sampler(model, config.rollout_settings())
    chunk = Chunk(0, "evaluate", 0, 3, (PROMPTS[0],), (0,))
    trajectories, _ = sampler.sample(chunk, lora.snapshot(model.unet, 0))
    code = model_card.usage(config, "diffusers", tiny_sd3, str(tmp_path / "out"))
    scope: dict = {}
    start, *drawn = (
        torch.from_numpy(noise_module.normal(3, noise_module.EVALUATION, 0, [0], step, (4, 16, 16)))
        for step in (noise_module.INITIAL_STATE, *range(1, 5))
    )
    draws = iter(drawn)
    monkeypatch.setattr(torch, "randn_like", lambda like: next(draws).to(like))
    code = code.replace('"a prompt"', f"{PROMPTS[0]!r}, height=64, width=64, latents=start, output_type='latent'")
    code = code.replace('.images[0].save("image.png")', "").replace("\npipe(", "\nfound = pipe(")
    scope["start"] = start
    exec(code, scope)
    found = scope["found"].images
    torch.testing.assert_close(found, torch.from_numpy(trajectories.states[:, -1]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["kohya", "peft", "fused"])
def test_forms_that_are_not_written_say_which_is(run, tmp_path, capsys, form):
    from commands.export import main as export

    assert export([str(run), "--format", form, "--out", str(tmp_path / "out")]) == 2
    assert "use --format diffusers" in capsys.readouterr().err
