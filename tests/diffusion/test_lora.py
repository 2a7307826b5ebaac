"""The adapter as buffer and as files: what other programs load draws the sampler's own pixels."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from diffusion import lora, noise
from diffusion.base_model import BaseModel, Decoder
from diffusion.rollout import Sampler
from diffusion.settings import RolloutSettings
from diffusion.trajectory import Chunk

STEPS, RANK, ALPHA = 5, 4, 6.0  # steps that divide 1000: diffusers' grid
PROMPTS = ("a red circle on a white background", "a small blue star on a black background", "a green ring")


class Recorded(DDIMScheduler):
    """diffusers' own, fed noise that was drawn before."""

    def step(self, *args, eta=0.0, generator=None, **kwargs):
        return super().step(*args, eta=eta, variance_noise=self.noise.pop(0), **kwargs)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A LoRA with alpha != rank, saved, and pictures of it by our own sampler."""
    folder = tmp_path_factory.mktemp("lora")
    model = BaseModel("models/shapes")
    model.attach_lora(RANK, ALPHA, seed=0)
    flat = lora.snapshot(model.unet, 0).flat
    flat = (flat + 0.06 * np.random.default_rng(0).standard_normal(flat.shape)).astype(np.float32)
    sampler = Sampler(model, RolloutSettings(num_steps=STEPS, guidance=3.0))
    chunk = Chunk(0, "evaluate", 0, 11, PROMPTS, (0, 1, 2))
    trajectories, _ = sampler.sample(chunk, lora.Snapshot(1, flat, lora.digest(flat)))
    images = Decoder("models/shapes")(torch.from_numpy(trajectories.states[:, -1]))
    lora.save_files(model.unet, folder)
    return folder, images.permute(0, 2, 3, 1).numpy()


def plain_images(folder, weight_name: str | None) -> np.ndarray:
    """What plain diffusers draws (tests/commands/test_export.py does it in a process without anything of ours)."""
    pipe = StableDiffusionPipeline.from_pretrained("models/shapes")
    pipe.scheduler = Recorded.from_config(pipe.scheduler.config)
    shape = (pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    draws = [noise.normal(11, noise.EVALUATION, 0, range(len(PROMPTS)), i, shape) for i in range(STEPS + 1)]
    initial, *pipe.scheduler.noise = map(torch.from_numpy, draws)
    if weight_name:
        pipe.load_lora_weights(folder, weight_name=weight_name)
    return pipe(
        list(PROMPTS), latents=initial, num_inference_steps=STEPS, guidance_scale=3.0, eta=1.0, output_type="np"
    ).images


def test_plain_diffusers_draws_the_samplers_pixels(recorded):
    """So both files carry alpha."""
    folder, ours = recorded
    assert np.abs(plain_images(folder, None) - ours).mean() > 0.02  # the LoRA moves pixels
    for name in (lora.DIFFUSERS_FILE, lora.KOHYA_FILE):
        assert np.abs(plain_images(folder, name) - ours).max() < 2e-3


def test_the_adapter_is_its_seeds_and_a_buffer_of_one_length(tiny_pipeline):
    first, second, third = (BaseModel(tiny_pipeline) for _ in range(3))
    for model, seed in ((first, 4), (second, 4), (third, 1)):
        model.attach_lora(2, 3, seed=seed)
    here, same, there = (lora.snapshot(model.unet, 0) for model in (first, second, third))
    assert here.sha256 == same.sha256 != there.sha256
    assert lora.files(first.unet) == lora.files(second.unet)  # equal adapters are equal files
    assert not here.flat.flags.writeable
    x, t, embeddings = torch.randn(1, 4, 16, 16), torch.tensor([99]), first.embed(["a red ring"])
    with torch.no_grad():  # B is zero
        assert torch.equal(first.predict(x, t, embeddings, 1.0)[0], first.predict_reference(x, t, embeddings))
    lora.load(third.unet, here.flat)
    assert lora.snapshot(third.unet, 0).sha256 == here.sha256
    with pytest.raises(ValueError, match="adapter"):
        lora.load(third.unet, here.flat[:-1])
