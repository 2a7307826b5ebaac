"""The committed weights: a real pipeline that plain diffusers opens and that draws what it is asked."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from models.shapes.measure import correct, generate, scenes

FOLDER = Path("models/shapes")


@pytest.fixture(scope="module")
def pipeline():
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def accuracy(pipeline, kind: str, count: int) -> float:
    asked = scenes(kind, count)
    images = generate(pipeline, [scene.caption() for scene in asked], 10, 3.0)
    return float(np.mean([correct(image, scene) for image, scene in zip(images, asked, strict=True)]))


@pytest.mark.long
def test_draws_common_prompts_and_leaves_headroom_on_rare_ones(pipeline):
    assert accuracy(pipeline, "seen", 96) >= 0.8
    assert accuracy(pipeline, "held-out", 48) >= 0.8
    assert accuracy(pipeline, "small", 96) <= 0.5
    assert accuracy(pipeline, "right", 96) <= 0.7


def test_loads_in_one_precision_is_small_and_every_word_is_one_token(pipeline):
    dtypes = {p.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()}
    assert dtypes == {torch.float32}
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= 6e6
    assert pipeline.scheduler.config.set_alpha_to_one is False
    with safe_open(FOLDER / "text_encoder/model.safetensors", "pt") as opened:  # as transformers 4 reads them, too
        assert all(name.startswith("text_model.") for name in opened.keys())  # noqa: SIM118
    assert {file.name for file in (FOLDER / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
    ids = pipeline.tokenizer("a small red circle and a blue square on a white background").input_ids
    assert len(ids) == 12 + 2
