"""What is read off pictures: of the shapes world, and by a tiny random CLIP."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_aesthetic
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from models.shapes.world import COLOURS, IMAGE_SIZE, SHAPES, Scene, Thing, coverage, draw
from rewards import attributes
from rewards.network import short_side
from rewards.weights import BadWeights, WeightsNotFound

VALUES = {"animal": ("a cat", "a dog", "two birds"), "sky": ("blue", "grey")}
PICTURES = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)
LETTERS = [*"abcdefghijklmnopqrstuvwxyz"]


def at(x: float, y: float, r: float = 8.0) -> np.ndarray:
    """A red circle there, on white."""
    alpha = coverage("circle", x, y, r)[..., None]
    return np.rint(245 * (1 - alpha) + np.array(COLOURS["red"]) * alpha).astype(np.uint8)


def read(picture: np.ndarray, prompt: str = "a red circle on a white background") -> dict[str, str]:
    found = attributes.of_shapes([picture], [prompt])
    assert tuple(found) == attributes.SHAPES
    return {name: values[codes[0]] for name, (values, codes) in found.items()}


def test_a_drawing_has_the_attributes_that_it_was_drawn_with():
    rng = np.random.default_rng(0)
    for colour, shape, background in (("blue", "star", "sand"), ("green", "ring", "black"), ("red", "cross", "white")):
        scene = Scene((Thing(colour, shape),), background)
        seen = read(draw(scene, rng), scene.caption())
        assert (seen["colour"], seen["shape"], seen["background"]) == (colour, shape, background)
        assert seen["size"] == "medium" and seen["right"] == "yes"
        assert read(draw(scene, rng), f"a pink circle on a {background} background")["right"] == "no"
    sizes = {
        name: read(draw(Scene((Thing("red", "circle", name),), "white"), rng))["size"] for name in ("small", "large")
    }
    assert sizes == {"small": "small", "large": "large"}
    pair = Scene((Thing("red", "circle"), Thing("blue", "square")), "white")
    seen = read(draw(pair, rng), pair.caption())
    assert (seen["colour"], seen["shape"], seen["right"]) == ("red", "circle", "yes")


def test_places_are_binned_from_left_to_right_and_top_to_bottom():
    places = [read(at(x, y)) for x, y in ((12, 50), (22, 42), (33, 31), (50, 12))]
    assert [seen["place_x"] for seen in places] == ["below 20", "20-24", "32-36", "from 44"]
    assert [seen["place_y"] for seen in places] == ["from 44", "40-44", "28-32", "below 20"]


def test_a_picture_without_an_object_has_none():
    seen = read(np.full((IMAGE_SIZE, IMAGE_SIZE, 3), 140, np.uint8))
    assert {seen[name] for name in ("colour", "shape", "size", "place_x", "place_y")} == {attributes.NONE}
    assert seen["background"] == "gray" and seen["right"] == "no"
    empty = attributes.of_shapes([], [])
    assert all(len(codes) == 0 for _, codes in empty.values()) and len(empty["shape"][0]) == len(SHAPES) + 1


def test_prompts_of_the_shapes_world_are_known():
    assert attributes.names_shapes(["a red circle", "a blue square on a sand background"])
    assert not attributes.names_shapes(["a red circle", "a photo of a dog"]) and not attributes.names_shapes([])


def test_attributes_are_named_with_their_values():
    assert attributes.named("animal=a cat, a dog,a cat") == ("animal", ("a cat", "a dog"))
    for text in ("animal", "animal=a cat", "=a,b", "animal=a,,"):
        with pytest.raises(ValueError, match="expected NAME=VALUE,VALUE"):
            attributes.named(text)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """CLIP's files as transformers saves them, of random weights."""
    folder = tmp_path_factory.mktemp("clip")
    words = {
        token: i
        for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{x}</w>" for x in LETTERS)])
    }
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    vision = size | {"image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu"}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for value in model.parameters():  # as initialised all texts are nearly one
            value.mul_(3)
    model.save_pretrained(folder)
    return folder


def test_clip_reads_the_nearest_text_as_transformers_own(clip):
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    found = attributes.by_clip(VALUES, str(clip))(PICTURES)
    pixels = short_side(torch.from_numpy(PICTURES).permute(0, 3, 1, 2).float() / 255, 32)
    for name, values in VALUES.items():
        tokens = tokenizer(list(values), padding=True, return_tensors="pt")
        with torch.no_grad():
            logits = model(**tokens, pixel_values=pixels).logits_per_image
        assert found[name][0] == values
        np.testing.assert_array_equal(found[name][1], logits.argmax(1))
    many = np.tile(PICTURES, (15, 1, 1, 1))
    assert len(attributes.by_clip(VALUES, str(clip))(many)["sky"][1]) == 75


def test_clip_that_cannot_be_had_is_named(clip, tmp_path):
    attributes.require_clip(str(clip))
    with pytest.raises(WeightsNotFound, match=r"evaluation\.clip"):
        attributes.require_clip(str(tmp_path / "nowhere"))
    image_alone = write_aesthetic(tmp_path)["clip"]
    with pytest.raises(WeightsNotFound, match=r"vocab\.json"):
        attributes.require_clip(image_alone)
    for file in clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(clip / "model.safetensors")
    save_file(
        {key: value for key, value in state.items() if "text_projection" not in key}, tmp_path / "model.safetensors"
    )
    with pytest.raises(BadWeights, match=r"no CLIP, of 78 keys 1 missing: text_projection\.weight"):
        attributes.by_clip(VALUES, str(tmp_path))
