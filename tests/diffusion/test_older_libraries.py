"""What is written draws the same pictures with older libraries, in environments of their own. Needs a package index and
1 GB of temporary disk a pair."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from commands import export
from diffusion import lora
from diffusion.base_model import BaseModel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# The oldest that the docs name; and a diffusers that reads a file's LoRA settings, with a PEFT that lacks some of them.
OLD = {
    "oldest": ("diffusers==0.31.0", "peft==0.13.0", "transformers==4.46.3"),
    "transformers 4": ("diffusers==0.35.2", "peft==0.17.1", "transformers==4.56.2"),
}
# Draws with each: argv is a file of pictures to write, and what to load as JSON: base model, folder and name of a LoRA.
DRAW = """
import json, sys
import numpy, torch
from diffusers import DDIMScheduler, DDPMPipeline, StableDiffusionPipeline
from peft import PeftModel
torch.set_num_threads(1)
pictures = {}
for name, (base, folder, file) in json.loads(sys.argv[2]).items():
    rng = numpy.random.default_rng(0)
    normal = lambda side, channels: torch.from_numpy(rng.standard_normal((1, channels, side, side), numpy.float32))
    if file == "adapter_model.safetensors":
        unet = PeftModel.from_pretrained(DDPMPipeline.from_pretrained(base).unet, folder).merge_and_unload()
        with torch.no_grad():
            pictures[name] = unet(normal(16, 3), torch.tensor([99])).sample.numpy()
        continue
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    if folder:
        pipe.load_lora_weights(folder, weight_name=file)
    unet = pipe.unet.config
    latents = normal(unet.sample_size, unet.in_channels)
    drawn = pipe(["a small red ring"], latents=latents, num_inference_steps=3, guidance_scale=3.0, output_type="np")
    pictures[name] = drawn.images
numpy.savez(sys.argv[1], **pictures)
"""


def moved(model: BaseModel, folder: Path) -> None:
    """The files of a LoRA with alpha != rank that moves pixels."""
    model.attach_lora(4, 6.0, seed=0)
    flat = lora.snapshot(model.unet, 0).flat
    lora.load(model.unet, (flat + 0.06 * np.random.default_rng(0).standard_normal(flat.shape)).astype(np.float32))
    lora.save_files(model.unet, folder)


@pytest.fixture(scope="module")
def written(finished_run, ddpm, tiny_pipeline, tmp_path_factory):
    folder, shapes = tmp_path_factory.mktemp("written"), "models/shapes"
    moved(BaseModel(shapes), folder / "lora")
    moved(BaseModel(ddpm), folder / "peft")
    exports = {form: folder / form for form in ("diffusers", "kohya", "fused")}
    for form, out in exports.items():
        assert export.main([str(finished_run), "--format", form, "--out", str(out)]) == 0
    return {
        "shapes": (shapes, None, None),
        "tiny": (tiny_pipeline, None, None),
        "lora": (shapes, str(folder / "lora"), lora.DIFFUSERS_FILE),
        "kohya": (shapes, str(folder / "lora"), lora.KOHYA_FILE),
        "peft": (ddpm, str(folder / "peft"), lora.PEFT_FILES[1]),
        "exported": (tiny_pipeline, str(exports["diffusers"]), lora.DIFFUSERS_FILE),
        "exported kohya": (tiny_pipeline, str(exports["kohya"]), lora.KOHYA_FILE),
        "fused": (str(exports["fused"]), None, None),
    }


def drawn(python, written, folder) -> dict[str, np.ndarray]:
    command = [str(python), "-c", DRAW, str(folder / "drawn.npz"), json.dumps(written)]
    subprocess.run(command, check=True, timeout=600)
    return dict(np.load(folder / "drawn.npz"))


@pytest.mark.parametrize("name", OLD)
def test_older_libraries_draw_the_same(name, written, tmp_path):
    ours = drawn(sys.executable, written, tmp_path)
    assert np.abs(ours["lora"] - ours["shapes"]).max() > 0.1
    with tempfile.TemporaryDirectory(prefix="older-") as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=300)
        packages = [f"torch=={torch.__version__.split('+')[0]}", *OLD[name], "accelerate==1.15.0"]
        subprocess.run([f"{folder}/bin/pip", "install", "-q", *packages], check=True, timeout=1500)
        theirs = drawn(f"{folder}/bin/python", written, tmp_path)
    apart = {key: float(np.abs(theirs[key] - ours[key]).max()) for key in written}
    print(f"{name}: max pixel difference {apart}")
    assert max(apart.values()) < 1e-3
