"""ImageReward: BLIP's ViT-L/16 read by a BERT with cross-attention, and a linear stack; about mean 0, deviation 1.

Xu et al. 2023, arXiv 2304.05977; github.com/THUDM/ImageReward.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from rewards.network import NetworkReward, Published, Shapes, fill, score_head
from rewards.weights import Asset, BadWeights, find, read

WEIGHTS, MED_CONFIG = "THUDM/ImageReward:ImageReward.pt", "THUDM/ImageReward:med_config.json"
TOKENIZER = "bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, by its authors
TOKENS = 35
PROJECTED = 256
# From the names of `Network`'s tensors to its authors', in this order.
NAMES = (
    ("vision.embeddings.class_embedding", "vision.cls_token"),
    ("vision.embeddings.position_embedding", "vision.pos_embed"),
    ("vision.embeddings.patch_embedding.", "vision.patch_embed.proj."), ("vision.post_layernorm.", "vision.norm."),
    ("vision.encoder.layers.", "vision.blocks."), (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."), (".layer_norm", ".norm"), ("vision.", "blip.visual_encoder."),
    ("text.", "blip.text_encoder."), ("head.", "mlp.layers."),
)  # fmt: skip


@dataclass(frozen=True)
class Vision:
    """BLIP's ViT-L/16; the MLPs are four times as wide."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    patch: int = 16
    image: int = 224

    def config(self) -> BlipVisionConfig:
        """BLIP was trained with layer_norm_eps 1e-6; transformers' default is another."""
        return BlipVisionConfig(
            hidden_size=self.width, intermediate_size=4 * self.width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, image_size=self.image, patch_size=self.patch, hidden_act="gelu",
            layer_norm_eps=1e-6, attention_dropout=0.0,
        )  # fmt: skip


class Network(nn.Module):
    """Normalised pixels [B, 3, S, S], token ids and mask [B, 35] -> scores [B]."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = score_head(text.hidden_size)

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen = self.vision(pixel_values=pixels).last_hidden_state
        # A decoder's layers (cross-attention), but no causal mask.
        read = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, is_decoder=False)
        return (self.head(read.last_hidden_state[:, 0])[:, 0] - MEAN) / STD


class ImageReward(NetworkReward):
    """How well people would like a picture for its prompt, whose first 33 word pieces count."""

    name = "imagereward"

    @staticmethod
    def assets(
        weights: str | None = None, *, tokenizer: str = TOKENIZER, med_config: str | None = None,
        vision: dict[str, int] | None = None,
    ) -> list[Asset]:  # fmt: skip
        """What is read: `weights`, ImageReward.pt, `med_config`, its text tower's configuration, and `tokenizer`,
        BERT's, a folder or hub id. `vision` changes fields of `Vision`, for other sizes than the published one.

        Raises:
            TypeError: `vision` has other fields.
        """
        Vision(**vision or {})
        words = ("tokenizer.json|vocab.txt", "tokenizer_config.json?")
        return [
            Asset("reward.weights", weights or WEIGHTS, ("ImageReward.pt",)),
            Asset("reward.options.med_config", med_config or MED_CONFIG, ("med_config.json",)),
            Asset("reward.options.tokenizer", tokenizer, words, folder=True),
        ]

    def __init__(self, weights: str | None = None, device: str = "cpu", **options: Any) -> None:
        """`weights` and `options`: those of `assets`.

        Raises:
            WeightsNotFound, BadWeights: see there.
            TypeError: as `assets`.
        """
        file, med, folder = find(self.assets(weights, **options))
        size = Vision(**options.get("vision") or {})
        text = text_config(med, size.width)
        with torch.device("meta"):
            network = Network(size.config(), text)
        fill(network, read(file), f"{file}: no ImageReward", device, published, unused(size, text))
        super().__init__(network, size.image)
        self.tokenizer = BertTokenizer.from_pretrained(folder)

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, 35]; always as long, so that a score does not depend on which prompts are beside it."""
        encoded = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        return encoded["input_ids"], encoded["attention_mask"]


def text_config(path: Path, vision_width: int) -> BlipTextConfig:
    """The text tower's, from its authors' med_config.json.

    Raises:
        BadWeights: no such configuration.
    """
    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "hidden_act", "layer_norm_eps",
    )  # fmt: skip
    try:
        held = json.loads(path.read_text())
        fields: dict[str, Any] = {key: held[key] for key in keys}
        config = BlipTextConfig(
            **fields, encoder_hidden_size=vision_width, is_decoder=True, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, pad_token_id=0, bos_token_id=None, eos_token_id=None, sep_token_id=None,
        )  # fmt: skip
    except Exception as error:  # json, keys, and transformers' own validation
        raise BadWeights(f"{path} is no med_config.json of ImageReward: {type(error).__name__}: {error}") from error
    config._attn_implementation = "eager"  # its layers add the mask
    return config


def published(key: str) -> Published:
    for ours, theirs in NAMES:
        key = key.replace(ours, theirs)
    return Published(key)


def unused(size: Vision, text: BlipTextConfig) -> Shapes:
    """Published too, but no part of the score."""
    shapes: dict[str, tuple[int, ...]] = {
        "blip.text_encoder.embeddings.position_ids": (1, text.max_position_embeddings)
    }
    for name, width in (("blip.vision_proj", size.width), ("blip.text_proj", text.hidden_size)):
        shapes |= {f"{name}.weight": (PROJECTED, width), f"{name}.bias": (PROJECTED,)}
    return shapes
