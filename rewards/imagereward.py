"""ImageReward: BLIP's ViT-L/16 read by a BERT with cross-attention, and a linear stack; about mean 0, deviation 1.

Xu et al. 2023, arXiv 2304.05977; github.com/THUDM/ImageReward.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from rewards import preprocess
from rewards.network import check_keys, fill, full_precision, head_layout, match, on_meta, pair, score_head, shapes_of
from rewards.weights import Asset, BadWeights, find, read

WEIGHTS, MED_CONFIG = "THUDM/ImageReward:ImageReward.pt", "THUDM/ImageReward:med_config.json"
TOKENIZER = "bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, by its authors
TOKENS = 35
PROJECTED = 256
# Published, but not part of the score.
UNUSED = (
    "blip.vision_proj.weight", "blip.vision_proj.bias", "blip.text_proj.weight", "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
)  # fmt: skip
# From its authors' names to transformers', in this order.
RENAMES = [
    (r"^blip\.visual_encoder\.", "vision."), (r"^blip\.text_encoder\.", "text."), (r"^mlp\.layers\.", "head."),
    (r"^vision\.cls_token", "vision.embeddings.class_embedding"),
    (r"^vision\.pos_embed", "vision.embeddings.position_embedding"),
    (r"^vision\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^vision\.norm\.", "vision.post_layernorm."), (r"^vision\.blocks\.", "vision.encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."), (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
]  # fmt: skip


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


class ImageReward:
    """How well people would like a picture for its prompt."""

    name = "imagereward"
    differentiable = True

    @staticmethod
    def assets(
        weights: str | None = None, *, tokenizer: str = TOKENIZER, med_config: str | None = None,
        vision: dict[str, int] | None = None,
    ) -> list[Asset]:  # fmt: skip
        """What `__init__` reads; raises TypeError when `vision` has other fields."""
        Vision(**vision or {})
        return [
            Asset("reward.weights", weights or WEIGHTS, ("ImageReward.pt",)),
            Asset("reward.options.med_config", med_config or MED_CONFIG, ("med_config.json",)),
            Asset(
                "reward.options.tokenizer",
                tokenizer,
                ("tokenizer.json|vocab.txt", "tokenizer_config.json?"),
                folder=True,
            ),
        ]

    def __init__(
        self, weights: str | None = None, device: str = "cpu", *, tokenizer: str = TOKENIZER,
        med_config: str | None = None, vision: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        """`weights`: ImageReward.pt; `med_config`: its text tower's configuration; `tokenizer`: BERT's, a folder or hub
        id. `vision` changes fields of `Vision`, for other sizes than the published one.

        Raises:
            WeightsNotFound, BadWeights: see there.
            TypeError: `vision` has other fields.
        """
        file, med, folder = find(self.assets(weights, tokenizer=tokenizer, med_config=med_config, vision=vision))
        size = Vision(**vision or {})
        text = text_config(med, size.width)
        network = on_meta(lambda: Network(size.config(), text))
        state = read(file)
        check_keys(shapes_of(state), layout(size, text), f"{file}: no ImageReward", UNUSED)
        self.network = fill(network, rename(state), file, device)
        self.side = size.image
        self.tokenizer = BertTokenizer.from_pretrained(folder)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B prompts (their first 33 word pieces count) -> [B], with autograd to the
        images.
        """
        match(images, prompts)
        weight = next(self.network.parameters())
        pixels = preprocess.short_side(images, self.side).to(weight.device, weight.dtype)
        ids, mask = self.tokens(prompts)
        with full_precision(weight.device):
            return self.network(pixels, ids.to(weight.device), mask.to(weight.device))

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, 35]; always as long, so that a score does not depend on which prompts are beside it."""
        made = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )  # fmt: skip
        return made["input_ids"], made["attention_mask"]


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


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors under the names of `Network`."""
    renamed = {}
    for key, tensor in state.items():
        if key in UNUSED:
            continue
        for pattern, name in RENAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = tensor
    return renamed


def layout(size: Vision, text: BlipTextConfig) -> dict[str, tuple[int, ...]]:
    """Every key of the published checkpoint and its shape: 625 of them at the published sizes."""
    wide, hidden, middle = size.width, text.hidden_size, text.intermediate_size
    eye, reader = "blip.visual_encoder", "blip.text_encoder"
    shapes: dict[str, tuple[int, ...]] = {
        f"{eye}.cls_token": (1, 1, wide),
        f"{eye}.pos_embed": (1, (size.image // size.patch) ** 2 + 1, wide),
        **pair(f"{eye}.patch_embed.proj", wide, 3, size.patch, size.patch),
        **pair(f"{eye}.norm", wide),
    }
    for index in range(size.layers):
        block = f"{eye}.blocks.{index}"
        shapes |= pair(f"{block}.norm1", wide) | pair(f"{block}.norm2", wide)
        shapes |= pair(f"{block}.attn.qkv", 3 * wide, wide) | pair(f"{block}.attn.proj", wide, wide)
        shapes |= pair(f"{block}.mlp.fc1", 4 * wide, wide) | pair(f"{block}.mlp.fc2", wide, 4 * wide)
    shapes |= {
        f"{reader}.embeddings.position_ids": (1, text.max_position_embeddings),
        f"{reader}.embeddings.word_embeddings.weight": (text.vocab_size, hidden),
        f"{reader}.embeddings.position_embeddings.weight": (text.max_position_embeddings, hidden),
        **pair(f"{reader}.embeddings.LayerNorm", hidden),
    }
    for index in range(text.num_hidden_layers):
        layer = f"{reader}.encoder.layer.{index}"
        for kind, source in (("attention", hidden), ("crossattention", wide)):
            shapes |= pair(f"{layer}.{kind}.self.query", hidden, hidden)
            shapes |= pair(f"{layer}.{kind}.self.key", hidden, source)
            shapes |= pair(f"{layer}.{kind}.self.value", hidden, source)
            shapes |= pair(f"{layer}.{kind}.output.dense", hidden, hidden)
            shapes |= pair(f"{layer}.{kind}.output.LayerNorm", hidden)
        shapes |= pair(f"{layer}.intermediate.dense", middle, hidden)
        shapes |= pair(f"{layer}.output.dense", hidden, middle) | pair(f"{layer}.output.LayerNorm", hidden)
    shapes |= pair("blip.vision_proj", PROJECTED, wide) | pair("blip.text_proj", PROJECTED, hidden)
    return shapes | head_layout("mlp.layers.", hidden)
