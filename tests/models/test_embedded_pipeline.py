"""The committed weights: a real pipeline that plain diffusers opens and that draws what it is asked."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from models.shapes import measure, world
from models.shapes.measure import evenness, generate, law, scenes
from models.shapes.train import build_tokenizer, start_from

FOLDER = Path("models/shapes")


@pytest.fixture(scope="module")
def pipeline():
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def accuracy(pipeline, kind: str, count: int) -> float:
    return measure.accuracy(pipeline, scenes(kind, count), 10, 3.0)


@pytest.mark.long
def test_draws_common_prompts_and_leaves_headroom_on_rare_ones(pipeline):
    assert accuracy(pipeline, "seen", 96) >= 0.8
    assert accuracy(pipeline, "held-out", 48) >= 0.8
    assert accuracy(pipeline, "small", 96) <= 0.5
    assert accuracy(pipeline, "two", 96) <= 0.5 and accuracy(pipeline, "bottom", 96) <= 0.5


@pytest.mark.long
def test_draws_open_prompts_and_leaves_them_open(pipeline):
    assert accuracy(pipeline, "no-background", 96) >= 0.75
    assert accuracy(pipeline, "any-colour", 96) >= 0.8 and accuracy(pipeline, "any-shape", 96) >= 0.9
    drawn = law(generate(pipeline, ["a circle"] * 96, 10, 3.0))
    # Green circles are held out: seven colours, .94 at most.
    assert evenness(drawn["colour"]) >= 0.7 and evenness(drawn["background"]) >= 0.8


def test_loads_in_one_precision_is_small_and_every_word_is_one_token(pipeline):
    dtypes = {p.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in part.parameters()}
    assert dtypes == {torch.float32}
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= 6e6
    assert pipeline.scheduler.config.set_alpha_to_one is False
    with safe_open(FOLDER / "text_encoder/model.safetensors", "pt") as opened:  # as transformers 4 reads them, too
        assert all(name.startswith("text_model.") for name in opened.keys())  # noqa: SIM118
    assert {file.name for file in (FOLDER / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
    ids = pipeline.tokenizer("a small red circle and an orange shape on a white background").input_ids
    assert len(ids) == 12 + 2


def test_training_can_start_from_the_committed_weights_with_a_larger_vocabulary(pipeline, tmp_path, monkeypatch):
    words = [*world.vocabulary(), "zebra"]
    monkeypatch.setattr(world, "vocabulary", lambda: words)
    tokenizer = build_tokenizer(tmp_path)
    unet, text_encoder = start_from(FOLDER, tokenizer)
    assert len(tokenizer) > len(pipeline.tokenizer)
    assert all(map(torch.equal, unet.parameters(), pipeline.unet.parameters()))
    caption = "a small red circle and an orange shape"
    embedded, expected = (
        encoder(vocabulary(caption, return_tensors="pt").input_ids)[0]
        for encoder, vocabulary in ((text_encoder.eval(), tokenizer), (pipeline.text_encoder, pipeline.tokenizer))
    )
    torch.testing.assert_close(embedded, expected)
