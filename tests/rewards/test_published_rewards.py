"""The native reward models against their authors' own code: golden/make_*.py made the values, at tiny sizes."""

import json

import numpy as np
import pytest
import torch
from brightness import require_slope
from golden import inputs
from tiny_models import WRITE, clip_state
from transformers import BlipVisionConfig, CLIPConfig

from rewards import clip, hpsv2, imagereward, pickscore, registry
from rewards.network import Published, fill, layout, long_side, score_head, short_side
from rewards.weights import HPS_FILES

MODELS = sorted(WRITE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    held = {}

    def load(name: str):
        if name not in held:
            held[name] = registry.load(**WRITE[name](tmp_path_factory.mktemp(name)))
        held[name].network.float()
        return held[name]

    return load


def images(dtype=torch.float32) -> tuple[torch.Tensor, list[str]]:
    """[3, 3, 37, 29]: neither square nor of any model's size."""
    return torch.from_numpy(inputs.rng("images").uniform(0, 1, (3, 3, 37, 29))).to(dtype), inputs.TRICKY[:3]


def as_image(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(("name", "tolerance"), [("aesthetic", 1e-5), *((name, 1e-10) for name in MODELS[1:])])
def test_scores_and_gradients_are_those_of_the_authors_code(name, tolerance, made):
    golden, reward = inputs.golden(name), made(name)
    reward.network.to(kind := torch.float64 if tolerance < 1e-5 else torch.float32)
    pixels = torch.from_numpy(inputs.pixels(golden["gradients"].shape[-1])).to(kind).requires_grad_()
    scores = reward.network(pixels, *reward.tokens(inputs.PROMPTS))
    gradients = torch.autograd.grad(scores.sum(), pixels)[0]
    ours = {"scores": scores, "gradients": gradients}
    far = [np.abs(found.detach().numpy() - golden[key]).max() for key, found in ours.items()]
    print(f"{name}: largest differences of score {far[0]:.1e} and gradient {far[1]:.1e}")
    assert max(far) < tolerance
    assert np.abs(golden["gradients"]).max() > 1e-3 and np.ptp(golden["scores"]) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_reported_scores_of_pictures_are_those_of_the_authors_score(name, made):
    """Prompt and 8-bit picture, not square, through tokenizer, resize and model."""
    golden, reward = inputs.golden(name)["reported"], made(name)
    pairs = zip(inputs.pictures(), inputs.REPORTED, strict=True)
    scores = [reward(as_image(picture), [prompt]).item() for picture, prompt in pairs]
    print(f"{name}: largest difference {np.abs(np.array(scores) - golden).max():.1e} of {np.ptp(golden):.2f}")
    np.testing.assert_allclose(scores, golden, atol=3e-6)


@pytest.mark.parametrize(
    ("name", "resize"),
    [("imagereward", short_side), ("hpsv2", long_side), ("pickscore", pickscore.PickScore.resize)],
)
def test_preprocessing_is_that_of_the_authors_transforms(name, resize):
    for picture, expected in zip(inputs.pictures(), inputs.golden(name)["preprocessed"], strict=True):
        np.testing.assert_allclose(resize(as_image(picture), expected.shape[-1])[0].numpy(), expected, atol=3e-6)


def test_the_clip_score_is_cut_at_zero_and_has_no_slope_there(tmp_path):
    turned = -clip_state(inputs.CLIP_SCORE_SEED)["text_projection.weight"]
    reward = registry.load(**WRITE["clip_score"](tmp_path, text_projection__weight=turned))
    pictures, prompts = images()
    scores = reward(pictures.requires_grad_(), prompts)
    assert scores.tolist() == [0, 0, 0] and not torch.autograd.grad(scores.sum(), pictures)[0].any()


def test_resizing_for_gradients_is_close_to_that_of_pictures():
    for picture in inputs.pictures():
        image = as_image(picture)
        far = short_side(image, 20) - short_side(image.clone().requires_grad_(), 20)
        # A step of 8 bits is 0.0146 here, and PIL rounds twice; it also cuts off what overshoots.
        assert far.abs().mean() < 0.006
        assert (far.abs().max() > 0) == (20 not in picture.shape)
        with torch.no_grad():  # without a graph an image is a picture
            assert torch.equal(short_side(image.clone().requires_grad_(), 20), short_side(image, 20))


@pytest.mark.parametrize("name", MODELS[1:])
def test_tokens_are_those_of_the_authors(name, made):
    ids, *masks = made(name).tokens(inputs.TRICKY)
    assert ids.tolist() == inputs.golden(name)["tokens"].tolist()
    assert all(torch.equal(mask, (ids != 0).long()) for mask in masks)


def published_network(name: str, tmp_path):
    with torch.device("meta"):
        if name != "imagereward":
            return {"hpsv2": clip, "pickscore": pickscore}[name].Network(clip.vit_h())
        (tmp_path / "med_config.json").write_text(json.dumps(inputs.PUBLISHED_MED_CONFIG))
        vision = imagereward.vision_config()
        return imagereward.Network(vision, imagereward.text_config(tmp_path / "med_config.json", vision.hidden_size))


@pytest.mark.parametrize(
    ("name", "count"), [("aesthetic", 10), ("hpsv2", 686), ("imagereward", 625), ("pickscore", 912)]
)
def test_every_published_key_is_known_and_loads_strictly_at_full_size(name, count, tmp_path):
    keys = inputs.published_keys(name)
    assert len(keys) == count
    if name == "aesthetic":
        assert keys == {f"mlp.layers.{key}": shape for key, shape in layout(score_head(768)).items()}
        return
    network = published_network(name, tmp_path)
    published, unused = {
        "hpsv2": (hpsv2.published, ()),
        "imagereward": (imagereward.published, imagereward.UNUSED),
        "pickscore": (Published, clip.POSITIONS),
    }[name]
    assert layout(network, published) == {key: keys[key] for key in keys if not key.startswith(unused)}
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    fill(lambda: network, state, name, "meta", published, unused)


def test_published_configurations(tmp_path):
    """What weights cannot show, or barely: the wrong epsilon shifts an ImageReward by less than one would notice."""
    network = published_network("imagereward", tmp_path)
    vision, text = network.vision.config, network.text.config
    assert vision.layer_norm_eps == 1e-6 != BlipVisionConfig().layer_norm_eps
    assert (vision.hidden_act, vision.num_attention_heads, vision.num_hidden_layers) == ("gelu", 16, 24)
    assert (vision.hidden_size, vision.intermediate_size, vision.patch_size, vision.image_size) == (1024, 4096, 16, 224)
    assert (text.vocab_size, text.encoder_hidden_size, text.is_decoder) == (30524, 1024, True)
    assert (text.num_attention_heads, text.hidden_act, text.layer_norm_eps) == (12, "gelu", 1e-12)
    assert (imagereward.MEAN, imagereward.STD) == (0.16717362830052426, 1.0333394966054072)
    large, theirs = clip.vit_h(), CLIPConfig(**inputs.PUBLISHED_PICKSCORE)
    for tower, its in ((large.vision_config, theirs.vision_config), (large.text_config, theirs.text_config)):
        assert (tower.hidden_act, tower.layer_norm_eps, tower.num_attention_heads) == ("gelu", 1e-5, 16)
        for key in ("hidden_act", "layer_norm_eps", "hidden_size", "num_attention_heads", "num_hidden_layers"):
            assert getattr(tower, key) == getattr(its, key)
    assert (large.text_config.eos_token_id, large.text_config.max_position_embeddings) == (49407, 77)
    assert HPS_FILES == {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_finite_differences_and_the_callers_half_precision_stays_outside(name, made):
    reward, (pictures, prompts) = made(name), images()
    expected = reward(pictures, prompts)
    assert reward.name == name and reward.differentiable is True
    assert not any(parameter.requires_grad for parameter in reward.network.parameters())
    for images_, prompts_ in ((pictures, prompts[:1]), (torch.zeros(1, 4, 8, 8), ["one"])):
        with pytest.raises(ValueError, match="expected images"):
            reward(images_, prompts_)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(pictures, prompts), expected)
    scores = reward(half := pictures.bfloat16().requires_grad_(), prompts)
    assert scores.dtype == torch.float32 and torch.autograd.grad(scores.sum(), half)[0].isfinite().all()
    reward.network.double()
    gradient = require_slope(reward, *images(torch.float64), 1e-5, rel=1e-6, abs=1e-8)
    assert (gradient.abs().amax((1, 2, 3)) > 1e-6).all()
