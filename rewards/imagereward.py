"""ImageReward (arXiv 2304.05977, github.com/THUDM/ImageReward): how well people would like a picture for its prompt.
BLIP's ViT-L/16 read by a BERT with cross-attention, and a linear stack; about mean 0, deviation 1."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from rewards.network import NetworkReward, Published, Sizes, fill, score_head, tower
from rewards.weights import Asset, BadWeights, find, read

WEIGHTS, MED_CONFIG = "THUDM/ImageReward:ImageReward.pt", "THUDM/ImageReward:med_config.json"
TOKENIZER = "bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores, by its authors
TOKENS = 35  # with begin and end
UNUSED = ("blip.text_encoder.embeddings.position_ids", "blip.vision_proj.", "blip.text_proj.")  # published too
MED_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "hidden_act", "layer_norm_eps",
)  # fmt: skip
# From the names of `Network`'s tensors to its authors', in this order.
NAMES = (
    ("vision.embeddings.class_embedding", "vision.cls_token"),
    ("vision.embeddings.position_embedding", "vision.pos_embed"),
    ("vision.embeddings.patch_embedding.", "vision.patch_embed.proj."), ("vision.post_layernorm.", "vision.norm."),
    ("vision.encoder.layers.", "vision.blocks."), (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."), (".layer_norm", ".norm"), ("vision.", "blip.visual_encoder."),
    ("text.", "blip.text_encoder."), ("head.", "mlp.layers."),
)  # fmt: skip


def vision_config(
    *, width: int = 1024, layers: int = 24, heads: int = 16, patch: int = 16, image: int = 224
) -> BlipVisionConfig:
    """BLIP's ViT-L/16, or of other sizes. It was trained with layer_norm_eps 1e-6, not transformers' default."""
    sizes = tower(width, layers, heads) | {"image_size": image, "patch_size": patch}
    return BlipVisionConfig(**sizes, hidden_act="gelu", layer_norm_eps=1e-6, attention_dropout=0.0)


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
    name = "imagereward"

    @staticmethod
    def assets(
        weights: str | None = None, *, tokenizer: str = TOKENIZER, med_config: str = MED_CONFIG, vision: Sizes = None
    ) -> list[Asset]:
        """What is read: `weights`, `med_config`, the text tower's configuration, and BERT's `tokenizer`, a folder or
        hub id. `vision`: of `vision_config`, where it is not the published one; TypeError for its other keys."""
        vision_config(**vision or {})
        return [
            Asset("reward.weights", weights or WEIGHTS, ("ImageReward.pt",)),
            Asset("reward.options.med_config", med_config, ("med_config.json",)),
            Asset("reward.options.tokenizer", tokenizer, ("vocab.txt",), folder=True),
        ]

    def __init__(
        self, weights: str | None = None, device: str = "cpu", *, vision: Sizes = None, **options: Any
    ) -> None:
        """As `assets`. Raises WeightsNotFound, BadWeights."""
        file, med, folder = find(self.assets(weights, vision=vision, **options))
        config = vision_config(**vision or {})
        text = text_config(med, config.hidden_size)
        what, make = f"{file}: no ImageReward", lambda: Network(config, text)
        super().__init__(fill(make, read(file), what, device, published, UNUSED), config.image_size)
        self.tokenizer = BertTokenizer.from_pretrained(folder)

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, 35]; always as long, so that a score does not depend on which prompts are beside it."""
        words = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        encoded = self.tokenizer(list(prompts), **words)
        return encoded["input_ids"], encoded["attention_mask"]


def text_config(path: Path, vision_width: int) -> BlipTextConfig:
    """The text tower's, from its authors' med_config.json. Raises BadWeights where it is none."""
    try:
        published = json.loads(path.read_text())
        fields: dict[str, Any] = {key: published[key] for key in MED_KEYS}
        fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id"))
        fields |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
        config = BlipTextConfig(**fields, pad_token_id=0, encoder_hidden_size=vision_width, is_decoder=True)
    except Exception as error:  # json, keys, and transformers' own validation
        raise BadWeights(f"{path} is no med_config.json of ImageReward: {type(error).__name__}: {error}") from error
    config._attn_implementation = "eager"  # its layers add the mask
    return config


def published(key: str) -> Published:
    for ours, theirs in NAMES:
        key = key.replace(ours, theirs)
    return Published(key)
