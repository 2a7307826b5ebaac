"""Tiny reward models on disk in the exact published layouts, with the weights that the golden values were made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden import inputs
from safetensors.torch import save_file
from torch import Tensor
from transformers import BlipTextConfig, CLIPConfig
from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

from rewards import clip as clips
from rewards import hpsv2, imagereward
from rewards.network import fill, layout, score_head

VOCABULARY = len(inputs.bpe_vocabulary("<start>", "<end>"))
HPS_SIZE = {**inputs.HPS_SIZE, "vocabulary": VOCABULARY}


def imagereward_state() -> dict[str, Tensor]:
    text = BlipTextConfig(**{**inputs.MED_CONFIG, "encoder_hidden_size": inputs.MED_CONFIG["encoder_width"]})
    with torch.device("meta"):
        network = imagereward.Network(imagereward.vision_config(**inputs.IMAGEREWARD_VISION), text)
    unused = {name: (2, 3) for name in imagereward.UNUSED}
    return tensors(inputs.state(layout(network, imagereward.published) | unused, seed=1))


def hpsv2_state() -> dict[str, Tensor]:
    with torch.device("meta"):
        network = clips.Network(clips.vit_h(**HPS_SIZE))
    return tensors(inputs.state(layout(network, hpsv2.published), seed=2))


def clip_state(seed: int) -> dict[str, Tensor]:
    """Of a whole CLIP, with what older releases of transformers saved, too."""
    with torch.device("meta"):
        network = clips.Network(clips.vit_h(**HPS_SIZE))
    positions = dict(zip(clips.POSITIONS, ((1, 77), (1, 5)), strict=True))
    return tensors(inputs.state(layout(network) | positions, seed))


def clip_config(activation: str = "quick_gelu") -> CLIPConfig:
    size = inputs.AESTHETIC_SIZE
    vision = {
        "hidden_size": size["width"], "intermediate_size": 4 * size["width"], "num_hidden_layers": size["layers"],
        "num_attention_heads": size["width"] // 64, "image_size": size["image"], "patch_size": size["patch"],
        "hidden_act": activation, "projection_dim": size["embedding"],
    }  # fmt: skip
    return CLIPConfig(projection_dim=size["embedding"], vision_config=vision)


def aesthetic_state() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Head, and image tower under transformers' names; the golden values' authors have OpenCLIP's."""
    with torch.device("meta"):
        clip = CLIPVisionModelWithProjection(clip_config().vision_config)
        head = score_head(inputs.AESTHETIC_SIZE["embedding"])
    shapes = {f"clip_model.{key}": shape for key, shape in layout(clip, hpsv2.published).items()}
    shapes |= {f"mlp.layers.{key}": shape for key, shape in layout(head).items()}
    state = {key: value.float() for key, value in tensors(inputs.state(shapes, seed=3)).items()}
    saved = {key.removeprefix("clip_model."): value for key, value in state.items() if key.startswith("clip_model.")}
    tower = fill(lambda: clip, saved, "CLIP", published=hpsv2.published).state_dict()
    head = {key.removeprefix("mlp."): value for key, value in state.items() if key.startswith("mlp.")}
    return head, {key: value.contiguous() for key, value in tower.items()}


def tensors(made: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.array(value)) for key, value in made.items()}


def write_imagereward(folder: Path, **changed: Tensor | None) -> dict[str, Any]:
    """What `rewards.load` takes for it. `changed` tensors replace those of the checkpoint, or with None leave them out;
    dots of keys are written as double underscores.
    """
    (folder / "med_config.json").write_text(json.dumps(inputs.MED_CONFIG))
    torch.save(change(imagereward_state(), changed), folder / "ImageReward.pt")
    return {
        "name": "imagereward", "weights": str(folder / "ImageReward.pt"), "med_config": str(folder / "med_config.json"),
        "tokenizer": str(inputs.write_bert_tokenizer(folder / "bert")), "vision": inputs.IMAGEREWARD_VISION,
    }  # fmt: skip


def write_hpsv2(folder: Path, **changed: Tensor | None) -> dict[str, Any]:
    torch.save({"state_dict": change(hpsv2_state(), changed)}, folder / "HPS_v2.1_compressed.pt")
    tokenizer = inputs.write_clip_tokenizer(folder / "bpe")
    weights = str(folder / "HPS_v2.1_compressed.pt")
    return {"name": "hpsv2", "weights": weights, "tokenizer": str(tokenizer), "size": HPS_SIZE}


def write_aesthetic(folder: Path, activation: str = "quick_gelu", **changed: Tensor | None) -> dict[str, Any]:
    """As `write_imagereward`; `changed` are those of the head."""
    head, tower = aesthetic_state()
    torch.save(change(head, changed), folder / "aesthetic-model.pth")
    clip = folder / "clip"
    clip.mkdir(exist_ok=True)
    (clip / "config.json").write_text(clip_config(activation).to_json_string())
    # As the published file: the text tower is in it too.
    others = {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(2, 2),
              "vision_model.embeddings.position_ids": torch.arange(5)[None]}  # fmt: skip
    save_file(tower | others, clip / "model.safetensors")
    return {"name": "aesthetic", "weights": str(folder / "aesthetic-model.pth"), "clip": str(clip)}


def write_pickscore(folder: Path, **changed: Tensor | None) -> dict[str, Any]:
    weights = folder / clips.SAVED
    save_file(change(clip_state(inputs.PICKSCORE_SEED), changed), weights)
    tokenizer = inputs.write_clip_tokenizer(folder / "bpe")
    return {"name": "pickscore", "weights": str(weights), "tokenizer": str(tokenizer), "size": HPS_SIZE}


def write_clip_score(folder: Path, **changed: Tensor | None) -> dict[str, Any]:
    place = inputs.write_clip_tokenizer(folder / "whole")
    (place / "config.json").write_text(json.dumps(inputs.tiny_clip("quick_gelu")))
    save_file(change(clip_state(inputs.CLIP_SCORE_SEED), changed), place / clips.SAVED)
    return {"name": "clip_score", "weights": str(place)}


WRITE = {
    "aesthetic": write_aesthetic,
    "clip_score": write_clip_score,
    "hpsv2": write_hpsv2,
    "imagereward": write_imagereward,
    "pickscore": write_pickscore,
}


def change(state: dict[str, Tensor], changed: dict[str, Tensor | None]) -> dict[str, Tensor]:
    replaced = {key.replace("__", "."): value for key, value in changed.items()}
    return {key: value for key, value in {**state, **replaced}.items() if value is not None}
