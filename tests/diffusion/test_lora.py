"""The adapter as buffer and as files: what other programs load draws the sampler's own pixels."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from diffusion import lora, noise
from diffusion.base_model import BaseModel, Decoder
from diffusion.rollout import Sampler
from diffusion.settings import RolloutSettings
from diffusion.trajectory import Chunk

# Runs in a fresh process, with nothing of ours imported: plain diffusers, a scheduler fed the recorded noise.
PLAIN_DIFFUSERS = """
import sys, numpy as np, torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

model, folder, weight_name, recorded, out = sys.argv[1:]
torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained(model)
data = np.load(recorded)
noise = [torch.from_numpy(step) for step in data["noise"]]

class Recorded(DDIMScheduler):
    def step(self, *args, eta=0.0, generator=None, **kwargs):
        return super().step(*args, eta=eta, variance_noise=noise.pop(0), **kwargs)

pipe.scheduler = Recorded.from_config(pipe.scheduler.config)
if weight_name != "none":
    pipe.load_lora_weights(folder, weight_name=weight_name)
images = pipe(
    list(data["prompts"]), latents=torch.from_numpy(data["initial"]), num_inference_steps=len(data["noise"]),
    guidance_scale=3.0, eta=1.0, output_type="np",
).images
np.save(out, images)
"""
STEPS, RANK, ALPHA = 10, 4, 6.0
PROMPTS = (
    "a red circle on a white background",
    "a small blue star on a black background",
    "a green ring",
    "a pink cross",
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A LoRA with alpha != rank, saved, and pictures of it by our own sampler with the noise it drew."""
    folder = tmp_path_factory.mktemp("lora")
    model = BaseModel("models/shapes")
    model.attach_lora(RANK, ALPHA, seed=0)
    rng = np.random.default_rng(0)
    flat = lora.snapshot(model.unet, 0).flat
    flat = (flat + 0.06 * rng.standard_normal(flat.shape)).astype(np.float32)
    sampler = Sampler(model, RolloutSettings(num_steps=STEPS, guidance=3.0))
    chunk = Chunk(0, "evaluate", 0, 11, PROMPTS, (0, 1, 2, 3))
    trajectories, _ = sampler.sample(chunk, lora.Snapshot(1, flat, lora.digest(flat)))
    images = Decoder("models/shapes")(torch.from_numpy(trajectories.states[:, -1]))
    lora.save_files(model.unet, folder)
    draws = [noise.normal(11, noise.EVALUATION, 0, range(4), i, model.latent_shape) for i in range(STEPS + 1)]
    np.savez(folder / "recorded.npz", initial=draws[0], noise=np.stack(draws[1:]), prompts=np.array(PROMPTS))
    return folder, images.permute(0, 2, 3, 1).numpy()


def plain_images(folder, weight_name, tmp_path) -> np.ndarray:
    script, out = tmp_path / "plain.py", tmp_path / "images.npy"
    script.write_text(PLAIN_DIFFUSERS)
    arguments = ["models/shapes", str(folder), weight_name, str(folder / "recorded.npz"), str(out)]
    subprocess.run([sys.executable, str(script), *arguments], check=True, timeout=200, capture_output=True)
    return np.load(out)


@pytest.mark.parametrize("weight_name", [lora.DIFFUSERS_FILE, lora.KOHYA_FILE])
def test_plain_diffusers_draws_the_samplers_pixels(recorded, tmp_path, weight_name):
    folder, ours = recorded
    theirs = plain_images(folder, weight_name, tmp_path)
    base = plain_images(folder, "none", tmp_path)
    difference, moved = np.abs(theirs - ours).max(), np.abs(base - ours).mean()
    print(f"{weight_name}: max pixel difference {difference:.1e}; the LoRA moves pixels by {moved:.3f} on average")
    assert moved > 0.02
    assert difference < 2e-3


def test_files_carry_alpha(recorded):
    folder, _ = recorded
    with safe_open(str(folder / lora.DIFFUSERS_FILE), "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["unet.lora_alpha"] == ALPHA and metadata["unet.r"] == RANK
    with safe_open(str(folder / lora.KOHYA_FILE), "pt") as file:
        alphas = {float(file.get_tensor(name)) for name in file.keys() if name.endswith(".alpha")}  # noqa: SIM118
    assert alphas == {ALPHA}


def test_equal_adapters_are_equal_files(tiny_pipeline, tmp_path):
    model = BaseModel(tiny_pipeline)
    model.attach_lora(2, 3, seed=0)
    for i in range(4):
        lora.save_files(model.unet, tmp_path / str(i))
    for name in (lora.DIFFUSERS_FILE, lora.KOHYA_FILE):
        assert len({(tmp_path / str(i) / name).read_bytes() for i in range(4)}) == 1


def test_buffer_round_trip_and_hash(tiny_pipeline):
    first, second = BaseModel(tiny_pipeline), BaseModel(tiny_pipeline)
    first.attach_lora(2, 2, seed=0)
    second.attach_lora(2, 2, seed=1)
    here, there = lora.snapshot(first.unet, 0), lora.snapshot(second.unet, 0)
    assert here.sha256 != there.sha256
    lora.load(second.unet, here.flat)
    assert lora.snapshot(second.unet, 0).sha256 == here.sha256
    assert not here.flat.flags.writeable
    with pytest.raises(ValueError, match="adapter"):
        lora.load(second.unet, here.flat[:-1])


def test_initial_adapter_is_the_seeds_and_changes_nothing(tiny_pipeline):
    models = [BaseModel(tiny_pipeline) for _ in range(2)]
    for model in models:
        model.attach_lora(2, 2, seed=4)
    assert lora.snapshot(models[0].unet, 0).sha256 == lora.snapshot(models[1].unet, 0).sha256
    x, t, embeddings = torch.randn(1, 4, 16, 16), torch.tensor([99]), models[0].embed(["a red ring"])
    with torch.no_grad():
        adapted = models[0].predict(x, t, embeddings, 1.0)[0]
    assert torch.equal(adapted, models[0].predict_reference(x, t, embeddings))


def test_the_fingerprint_is_that_of_a_snapshot(tiny_pipeline):
    model = BaseModel(tiny_pipeline)
    model.attach_lora(2, 4.0, seed=0)
    before = lora.fingerprint(model.unet)
    assert before == lora.snapshot(model.unet, 1).sha256
    _, last = lora.named(model.unet)[-1]
    with torch.no_grad():
        last.view(-1)[-1] += 1e-6
    assert lora.fingerprint(model.unet) == lora.snapshot(model.unet, 1).sha256 != before
