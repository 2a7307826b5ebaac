"""The embedded flow model: the committed weights draw what they are asked in plain diffusers; what its training trains
is what plain diffusers draws with, and a stopped one goes on."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import CLIPTokenizer

from learner.config import ROOT
from models.shapes import measure
from models.shapes.measure import evenness, generate, law, scenes
from models.shapes_flow import train

FOLDER = ROOT / "models/shapes_flow"


@pytest.fixture(scope="module")
def pipeline():
    pipe = StableDiffusion3Pipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def accuracy(pipeline, kind: str, count: int) -> float:
    return measure.accuracy(pipeline, scenes(kind, count), 20, 3.0)


@pytest.mark.long
def test_draws_common_prompts(pipeline):
    assert accuracy(pipeline, "seen", 96) >= 0.8


@pytest.mark.long
def test_draws_open_prompts_and_leaves_them_open(pipeline):
    assert accuracy(pipeline, "no-background", 48) >= 0.75
    drawn = law(generate(pipeline, ["a circle"] * 48, 20, 3.0))
    assert evenness(drawn["colour"]) >= 0.7 and evenness(drawn["background"]) >= 0.7


def test_loads_in_one_precision_and_is_small(pipeline):
    encoders = pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3
    parts = (pipeline.transformer, pipeline.vae, *encoders)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= 6e6
    assert pipeline.scheduler.config.shift == 3.0


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(ROOT / "models/shapes/tokenizer")


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 5, 256])
def test_one_row_of_t5_that_counts_often_is_as_many_rows(tokenizer, rows):
    torch.manual_seed(0)
    network = train.Network(tokenizer).eval()
    torch.nn.init.normal_(network.transformer.proj_out.weight, std=0.3)
    x, sigma = torch.randn(2, 4, 16, 16), torch.tensor([0.3, 0.8])
    tokens = tokenizer(["a red circle", "a ring"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    read = [encoder(tokens, output_hidden_states=True) for encoder in network.encoders]
    text = torch.cat([each.hidden_states[-2] for each in read], -1)
    text = torch.cat([text, text.new_zeros(2, rows, text.shape[-1])], 1)
    pooled = torch.cat([each.text_embeds for each in read], -1)
    expected = network.transformer(x, text, pooled, 1000 * sigma).sample
    torch.testing.assert_close(network(x, sigma, tokens, rows), expected, rtol=1e-4, atol=1e-4)
    assert rows == 1 or (network(x, sigma, tokens, 1) - expected).abs().max() > 1e-3


def test_a_training_goes_on_and_its_pipeline_opens_in_plain_diffusers(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "BATCH", 2)
    latents, tokens = torch.randn(8, 4, 16, 16), torch.randint(3, 100, (8, 16))
    saved = []

    def go(steps: int, resume: bool) -> dict:
        torch.manual_seed(1)
        network = train.Network(tokenizer)
        train.train(network, latents, tokens, tokens[0], steps, tmp_path, resume, lambda mean: saved.append(mean))
        return torch.load(tmp_path / train.SAVED, weights_only=True)

    first, second = go(2, False), go(4, True)
    assert (first["step"], second["step"]) == (2, 4) and len(saved) == 2
    name = "transformer.proj_out.weight"
    assert not torch.equal(first["network"][name], second["network"][name])
    vae = train.shapes.build_vae()
    train.save_pipeline(tmp_path / "pipeline", vae, tokenizer, saved[-1])
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a red circle", num_inference_steps=2, guidance_scale=3.0, height=64, width=64).images[0]
    assert picture.size == (64, 64)
    zeros, *_ = pipeline.encode_prompt("a red circle", None, None, do_classifier_free_guidance=False)
    assert not zeros[:, 16:].any() and zeros[:, :16].any()
