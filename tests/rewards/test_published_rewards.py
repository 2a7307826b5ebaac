"""The native reward models against their authors' own code: golden/make_*.py made the values, at tiny sizes."""

import copy
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import inputs
from tiny_models import HPS_SIZE, WRITE
from transformers import BlipTextConfig, BlipVisionConfig, CLIPTokenizer

from diffusion.base_model import Decoder
from diffusion.trajectory import Chunk, CleanPredictions
from rewards import aesthetic, hpsv2, imagereward, registry
from rewards.network import adopt, fill, layout, long_side, score_head, short_side
from rewards.scorer import Scorer
from rewards.weights import HPS_FILES, BadWeights

MODELS = sorted(WRITE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Loaded by path through `registry.load`, each once."""
    held = {}

    def load(name: str):
        if name not in held:
            held[name] = registry.load(**WRITE[name](tmp_path_factory.mktemp(name)))
        held[name].network.float()
        return held[name]

    return load


def images(*, gradient: bool = False, dtype=torch.float32) -> tuple[torch.Tensor, list[str]]:
    """[3, 3, 37, 29]: neither square nor of any model's size."""
    values = inputs.rng("images").uniform(0, 1, (3, 3, 37, 29))
    return torch.from_numpy(values).to(dtype).requires_grad_(gradient), inputs.TRICKY[:3]


def as_image(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255


def native(reward, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The network alone, from normalised pixels."""
    return reward.network(pixels, *reward.tokens(prompts))


@pytest.mark.parametrize(("name", "tolerance"), [("aesthetic", 1e-5), ("hpsv2", 1e-10), ("imagereward", 1e-10)])
def test_scores_and_gradients_are_those_of_the_authors_code(name, tolerance, made):
    golden, reward = inputs.golden(name), made(name)
    pixels = torch.from_numpy(inputs.pixels(golden["gradients"].shape[-1]))
    if tolerance < 1e-5:
        reward.network.double()
    else:
        pixels = pixels.float()
    pixels.requires_grad_()
    scores = native(reward, pixels, inputs.PROMPTS)
    gradients = torch.autograd.grad(scores.sum(), pixels)[0]
    far = [
        np.abs(found.detach().numpy() - golden[key]).max()
        for key, found in (("scores", scores), ("gradients", gradients))
    ]
    print(f"{name}: largest differences of score {far[0]:.1e} and gradient {far[1]:.1e}")
    assert max(far) < tolerance
    assert np.abs(golden["gradients"]).max() > 1e-3 and np.ptp(golden["scores"]) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_reported_scores_of_pictures_are_those_of_the_authors_score(name, made):
    """Prompt and 8-bit picture, not square, through tokenizer, resize and model."""
    golden, reward = inputs.golden(name)["reported"], made(name)
    scores = [
        reward(as_image(picture), [prompt]).item()
        for picture, prompt in zip(inputs.pictures(), inputs.REPORTED, strict=True)
    ]
    print(f"{name}: largest difference {np.abs(np.array(scores) - golden).max():.1e} of {np.ptp(golden):.2f}")
    np.testing.assert_allclose(scores, golden, atol=3e-6)


@pytest.mark.parametrize(("name", "resize"), [("imagereward", short_side), ("hpsv2", long_side)])
def test_preprocessing_is_that_of_the_authors_transforms(name, resize):
    golden = inputs.golden(name)["preprocessed"]
    for picture, expected in zip(inputs.pictures(), golden, strict=True):
        found = resize(as_image(picture), 20)[0].numpy()
        np.testing.assert_allclose(found, expected, atol=3e-6)


def test_resizing_for_gradients_is_close_to_that_of_pictures():
    for picture in inputs.pictures():
        image = as_image(picture)
        far = short_side(image, 20) - short_side(image.clone().requires_grad_(), 20)
        # A step of 8 bits is 0.0146 here, and PIL rounds twice; it also cuts off what overshoots.
        assert far.abs().mean() < 0.006
        assert (far.abs().max() > 0) == (20 not in picture.shape)


def test_without_a_graph_an_image_is_a_picture():
    image = as_image(inputs.pictures()[0])
    with torch.no_grad():
        found = short_side(image.clone().requires_grad_(), 20)
    assert torch.equal(found, short_side(image, 20))


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_tokens_are_those_of_the_authors(name, made):
    ids, *masks = made(name).tokens(inputs.TRICKY)
    check_tokens(ids, inputs.golden(name)["tokens"])
    for mask in masks:
        assert torch.equal(mask, (ids != 0).long())


def check_tokens(ids: torch.Tensor, golden: np.ndarray) -> None:
    for prompt, found, expected in zip(inputs.TRICKY, ids.tolist(), golden.tolist(), strict=True):
        assert found == expected, prompt


@pytest.mark.skipif("CLIP_BPE" not in os.environ, reason="CLIP_BPE: bpe_simple_vocab_16e6.txt.gz of OpenCLIP")
def test_hps_tokens_are_those_of_openclip_with_the_true_vocabulary(made, tmp_path):
    merges = gzip.decompress(Path(os.environ["CLIP_BPE"]).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    reward = copy.copy(made("hpsv2"))
    reward.tokenizer = CLIPTokenizer.from_pretrained(inputs.write_clip_tokenizer(tmp_path / "true", merges))
    assert reward.tokenizer.eos_token_id == hpsv2.Size().vocabulary - 1
    check_tokens(reward.tokens(inputs.TRICKY)[0], inputs.golden("hpsv2_true_tokens")["tokens"])


def published_text(tmp_path) -> BlipTextConfig:
    (tmp_path / "med_config.json").write_text(json.dumps(inputs.PUBLISHED_MED_CONFIG))
    return imagereward.text_config(tmp_path / "med_config.json", imagereward.Vision().width)


@pytest.mark.parametrize(("name", "count"), [("aesthetic", 10), ("hpsv2", 686), ("imagereward", 625)])
def test_every_published_key_is_known_and_loads_strictly_at_full_size(name, count, tmp_path):
    keys = inputs.published_keys(name)
    assert len(keys) == count
    with torch.device("meta"):
        if name == "aesthetic":
            assert keys == {f"mlp.layers.{key}": shape for key, shape in layout(score_head(768)).items()}
            return
        size, text = imagereward.Vision(), published_text(tmp_path)
        if name == "hpsv2":
            network, published, unused = hpsv2.Network(hpsv2.Size().config()), hpsv2.published, {}
        else:
            network, published = imagereward.Network(size.config(), text), imagereward.published
            unused = imagereward.unused(size, text)
        assert keys == layout(network, published) | unused
        state = {key: torch.empty(shape) for key, shape in keys.items()}
    network.load_state_dict(adopt(network, state, published), strict=True, assign=True)


def test_published_configurations(tmp_path):
    """What weights cannot show, or barely: the wrong epsilon shifts an ImageReward by less than one would notice."""
    vision, text = imagereward.Vision().config(), published_text(tmp_path)
    assert vision.layer_norm_eps == 1e-6 != BlipVisionConfig().layer_norm_eps
    assert (vision.hidden_act, vision.num_attention_heads, vision.num_hidden_layers) == ("gelu", 16, 24)
    assert (vision.hidden_size, vision.intermediate_size, vision.patch_size, vision.image_size) == (1024, 4096, 16, 224)
    assert (text.vocab_size, text.encoder_hidden_size, text.is_decoder) == (30524, 1024, True)
    assert (text.num_attention_heads, text.hidden_act, text.layer_norm_eps) == (12, "gelu", 1e-12)
    assert (imagereward.MEAN, imagereward.STD) == (0.16717362830052426, 1.0333394966054072)
    clip = hpsv2.Size().config()
    for tower, heads in ((clip.vision_config, 16), (clip.text_config, 16)):
        assert (tower.hidden_act, tower.layer_norm_eps, tower.num_attention_heads) == ("gelu", 1e-5, heads)
    assert (clip.text_config.eos_token_id, clip.text_config.max_position_embeddings) == (49407, 77)
    assert HPS_FILES == {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


def test_defaults_are_the_published_ids():
    assert [asset.source for asset in hpsv2.HPSv2.assets(version="v2.0")] == [
        "xswu/HPSv2:HPS_v2_compressed.pt", "openai/clip-vit-large-patch14",
    ]  # fmt: skip
    assert [asset.source for asset in imagereward.ImageReward.assets()] == [
        "THUDM/ImageReward:ImageReward.pt", "THUDM/ImageReward:med_config.json", "bert-base-uncased",
    ]  # fmt: skip
    assert [asset.source for asset in aesthetic.Aesthetic.assets()] == [
        "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth", "openai/clip-vit-large-patch14",
    ]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_gradient_reaches_the_images_and_is_that_of_finite_differences(name, made):
    """Through the resize too."""
    reward = made(name)
    reward.network.double()
    pictures, prompts = images(gradient=True, dtype=torch.float64)
    gradient = torch.autograd.grad(reward(pictures, prompts).sum(), pictures)[0]
    assert (gradient.abs().amax((1, 2, 3)) > 1e-6).all()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        way = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
        ends = [
            reward((pictures.detach() + sign * 1e-5 * way).requires_grad_(), prompts).sum().item() for sign in (1, -1)
        ]
        assert (gradient * way).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_a_score_is_float32_repeatable_and_its_own_images_alone(name, made):
    reward, (pictures, prompts) = made(name), images()
    assert reward.name == name and reward.differentiable is True
    scores = reward(pictures, prompts)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    assert torch.equal(scores, reward(pictures, prompts))
    alone = [reward(pictures[i : i + 1], prompts[i : i + 1]).item() for i in range(3)]
    np.testing.assert_allclose(alone, scores, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in reward.network.parameters())
    if name == "hpsv2":
        assert scores.abs().max() <= 1


@pytest.mark.parametrize("name", MODELS)
def test_the_callers_autocast_and_half_precision_stay_outside(name, made):
    reward, (pictures, prompts) = made(name), images()
    expected = reward(pictures, prompts)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(pictures, prompts), expected)
    half = pictures.bfloat16().requires_grad_()
    scores = reward(half, prompts)
    assert scores.dtype == torch.float32
    assert torch.autograd.grad(scores.sum(), half)[0].isfinite().all()


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_the_prompt_matters_and_the_aesthetic_one_does_not_ask(name, made):
    pictures, _ = images()
    same = pictures[:1].expand(2, -1, -1, -1)
    first, second = made(name)(same, ["the cat", "a red bird"]).tolist()
    assert abs(first - second) > 1e-3
    first, second = made("aesthetic")(same, ["the cat", "a red bird"]).tolist()
    assert first == second


@pytest.mark.parametrize("name", MODELS)
def test_images_and_prompts_that_do_not_match_are_refused(name, made):
    with pytest.raises(ValueError, match="expected images"):
        made(name)(torch.zeros(2, 3, 8, 8), ["one"])
    with pytest.raises(ValueError, match="expected images"):
        made(name)(torch.zeros(1, 4, 8, 8), ["one"])


def test_buffers_that_no_checkpoint_holds_are_made_anew(made):
    positions = made("imagereward").network.text.embeddings.position_ids
    assert positions.tolist() == [list(range(inputs.MED_CONFIG["max_position_embeddings"]))]
    clip = made("hpsv2").network.clip
    assert clip.text_model.embeddings.position_ids.tolist() == [list(range(77))]
    assert clip.vision_model.embeddings.position_ids.tolist() == [list(range(5))]


def test_a_network_is_filled_whole_or_not_at_all():
    with torch.device("meta"):
        network = hpsv2.Network(HPS_SIZE.config())
    with pytest.raises(BadWeights, match="logit_scale"):
        fill(network, {}, "nothing", published=hpsv2.published)


@pytest.mark.parametrize("name", MODELS)
def test_the_scorer_learns_gradients_through_decoder_and_reward(name, made):
    decoder = Decoder("models/shapes")
    chunk = Chunk(0, "train", 0, 0, ("the cat", "a red bird"), (4, 9))
    latents = inputs.rng("latents").standard_normal((3, 4, 16, 16)).astype(np.float32)
    clean = CleanPredictions(chunk, 2, latents, np.array([0, 0, 1]), np.array([1, 2, 2]), 2)
    scores = Scorer(decoder, made(name), gradients=True).score(clean)
    assert scores.gradients.shape == latents.shape and scores.gradients.dtype == np.float32
    assert (np.abs(scores.gradients).max((1, 2, 3)) > 0).all()
    assert np.isfinite(scores.rewards[[0, 0, 1], [1, 2, 2]]).all()
