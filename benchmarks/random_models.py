"""Whole pipelines of public models' configurations (configs/models) with random weights, written part by part.

For the service, memory and speed, which do not depend on what the weights are; never for pictures.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.pipelines import build_tokenizer
from diffusion.families import FAMILIES
from diffusion.locate import INDEX, PUBLISHED
from diffusion.parts import text_encoders_without_weights, without_weights

WORDS = 49408  # of CLIP's tokenizer
# Left out: a T5-XXL in float32 is 19 GB. Stable Diffusion 3's pipeline does without it.
LEFT_OUT = ("text_encoder_3", "tokenizer_3")

VAE = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 8}
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    path: str  # hub id
    preset: str  # in configs/
    tiny: Mapping[str, Mapping[str, Any]]  # by part: what is smaller where the whole is to be tiny


MODELS = {
    "sd15": Model(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "sd15_compressibility.yaml",
        {
            "unet": {
                "block_out_channels": [32, 32, 64, 64], "layers_per_block": 1, "cross_attention_dim": 32,
                "norm_num_groups": 8, "sample_size": 8,
            },
        },
    ),
    "sdxl": Model(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "sdxl_pickscore.yaml",
        {
            "unet": {
                "block_out_channels": [32, 32, 64], "layers_per_block": 1, "cross_attention_dim": 64,
                "attention_head_dim": [2, 2, 4], "transformer_layers_per_block": [1, 1, 2], "norm_num_groups": 8,
                "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8, "sample_size": 16,
            },
        },
    ),
    "sd35_medium": Model(
        "stabilityai/stable-diffusion-3.5-medium",
        "sd35_medium_pickscore.yaml",
        {
            "transformer": {
                "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 64,
                "caption_projection_dim": 32, "pooled_projection_dim": 64, "dual_attention_layers": [0],
                "pos_embed_max_size": 32, "sample_size": 16,
            },
        },
    ),
}  # fmt: skip


def build(model: Model, folder: Path, tiny: bool = False, seed: int = 0) -> Path:
    """Write the pipeline's folder: configurations as published but for LEFT_OUT, weights in bfloat16. `tiny` has the
    same classes and levels, and CLIP's vocabulary still. The same for a seed; one core draws some 60 million numbers a
    second."""
    source = PUBLISHED / model.path
    folder.mkdir(parents=True)
    index = json.loads((source / INDEX).read_text())
    index |= {name: [None, None] for name in LEFT_OUT if name in index}
    _write(folder / INDEX, index)
    shutil.copytree(source / "scheduler", folder / "scheduler")
    there = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    smaller = {"vae": VAE, **{name: TEXT for name in there if name.startswith("text_encoder")}, **model.tiny}
    for name in there:
        if name.startswith("tokenizer"):
            build_tokenizer(folder / name, WORDS).save_pretrained(folder / name)
        elif name != "scheduler":
            (folder / name).mkdir()
            config = json.loads((source / name / "config.json").read_text())
            _write(folder / name / "config.json", config | dict(smaller[name] if tiny else {}))
    family = next(family for family in FAMILIES if index["_class_name"] in family.pipelines)
    network, vae = without_weights(str(folder))
    generator = torch.Generator().manual_seed(seed)
    parts = {family.network: network, "vae": vae, **text_encoders_without_weights(str(folder))}
    for name, part in parts.items():
        file = "model.safetensors" if name.startswith("text") else "diffusion_pytorch_model.safetensors"
        save_file(weights(part, generator), folder / name / file, {"format": "pt"})
    return folder


def weights(part: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Of every tensor of a part on the meta device: matrices that keep a signal's size, norms and biases as new."""
    return {name: _drawn(name, tensor, generator) for name, tensor in part.state_dict().items()}


def _drawn(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    if like.dim() < 2:
        return (torch.zeros if name.endswith("bias") else torch.ones)(like.shape, dtype=torch.bfloat16)
    drawn = torch.empty(like.shape, dtype=torch.bfloat16)
    width = 1.0 if "embed" in name else like[0].numel() ** -0.5
    for row in drawn.view(len(drawn), -1).split(max(1, 2**24 // like[0].numel())):  # not all of it in float32
        row.copy_(torch.randn(row.shape, generator=generator).mul_(width))
    return drawn


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
