"""Tiny reward models on disk in the exact published layouts, with the weights that the golden values were made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden import inputs
from torch import Tensor
from transformers import CLIPConfig

from rewards import hpsv2, imagereward
from rewards.network import head_layout

VOCABULARY = len(inputs.bpe_vocabulary("<start>", "<end>"))
HPS_SIZE = hpsv2.Size(**inputs.HPS_SIZE, vocabulary=VOCABULARY)


def imagereward_state() -> dict[str, Tensor]:
    folder_config = imagereward.BlipTextConfig(**{
        key: value for key, value in inputs.MED_CONFIG.items() if key not in ("encoder_width", "add_cross_attention")
    })  # fmt: skip
    shapes = imagereward.layout(imagereward.Vision(**inputs.IMAGEREWARD_VISION), folder_config)
    return tensors(inputs.state(shapes, seed=1))


def hpsv2_state() -> dict[str, Tensor]:
    return tensors(inputs.state(hpsv2.layout(HPS_SIZE), seed=2))


def aesthetic_state() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Head, and image tower under transformers' names."""
    size = inputs.AESTHETIC_SIZE
    like = hpsv2.Size(
        embedding=size["embedding"], image=size["image"], patch=size["patch"], vision_width=size["width"],
        vision_layers=size["layers"], text_layers=0,
    )  # fmt: skip
    tower = {f"clip_model.{key}": shape for key, shape in hpsv2.layout(like).items() if key.startswith("visual.")}
    made = tensors(inputs.state({**tower, **head_layout("mlp.layers.", size["embedding"])}, seed=3))
    head = {key.removeprefix("mlp."): value.float() for key, value in made.items() if key.startswith("mlp.")}
    seen = {key.removeprefix("clip_model."): value.float() for key, value in made.items() if "visual" in key}
    return head, {key.removeprefix("clip."): value.contiguous() for key, value in hpsv2.rename(seen).items()}


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
    """As `write_imagereward`."""
    torch.save({"state_dict": change(hpsv2_state(), changed)}, folder / "HPS_v2.1_compressed.pt")
    return {
        "name": "hpsv2", "weights": str(folder / "HPS_v2.1_compressed.pt"),
        "tokenizer": str(inputs.write_clip_tokenizer(folder / "bpe")),
        "size": {**inputs.HPS_SIZE, "vocabulary": VOCABULARY},
    }  # fmt: skip


def write_aesthetic(folder: Path, activation: str = "quick_gelu", **changed: Tensor | None) -> dict[str, Any]:
    """As `write_imagereward`; `changed` are those of the head."""
    from safetensors.torch import save_file

    size, (head, tower) = inputs.AESTHETIC_SIZE, aesthetic_state()
    torch.save(change(head, changed), folder / "aesthetic-model.pth")
    clip = folder / "clip"
    clip.mkdir(exist_ok=True)
    config = CLIPConfig(
        projection_dim=size["embedding"],
        vision_config={
            "hidden_size": size["width"], "intermediate_size": 4 * size["width"], "num_hidden_layers": size["layers"],
            "num_attention_heads": size["width"] // 64, "image_size": size["image"], "patch_size": size["patch"],
            "hidden_act": activation,
        },
    )  # fmt: skip
    (clip / "config.json").write_text(config.to_json_string())
    # As the published file: the text tower is in it too.
    others = {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(2, 2),
              "vision_model.embeddings.position_ids": torch.arange(5)[None]}  # fmt: skip
    save_file(tower | others, clip / "model.safetensors")
    return {"name": "aesthetic", "weights": str(folder / "aesthetic-model.pth"), "clip": str(clip)}


WRITE = {"aesthetic": write_aesthetic, "hpsv2": write_hpsv2, "imagereward": write_imagereward}


def change(state: dict[str, Tensor], changed: dict[str, Tensor | None]) -> dict[str, Tensor]:
    replaced = {key.replace("__", "."): value for key, value in changed.items()}
    return {key: value for key, value in {**state, **replaced}.items() if value is not None}
