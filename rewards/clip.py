"""CLIP (arXiv 2103.00020) by transformers' own classes, as the rewards on it share it: sizes, both towers, tokens."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPModel

from rewards.network import NetworkReward, fill, short_side, tower
from rewards.weights import Asset, BadWeights, read

CLIP = "openai/clip-vit-large-patch14"
SAVED = "model.safetensors"  # as transformers saves it
WORDS = ("vocab.json", "merges.txt")  # its tokenizer's
WHOLE = ("config.json", SAVED, *WORDS)
# Older releases of transformers saved these counts beside the weights.
POSITIONS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


class Network(CLIPModel):
    """Normalised pixels [B, 3, S, S] and token ids [B, 77] -> cosines [B]."""

    def pictures(self, pixels: Tensor) -> Tensor:
        """[B, E], of length 1."""
        return F.normalize(self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output), dim=-1)

    def texts(self, ids: Tensor) -> Tensor:
        """[B, E], of length 1. A text is read off at its end, before which no padding is seen: no mask is needed."""
        return F.normalize(self.text_projection(self.text_model(input_ids=ids).pooler_output), dim=-1)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        return (self.pictures(pixels) * self.texts(ids)).sum(-1)


Model = TypeVar("Model", bound=Network)


class ClipReward(NetworkReward):
    """A prompt counts by its first 75 tokens."""

    resize = staticmethod(partial(short_side, half=int))  # as CLIPImageProcessor
    network: Network

    def __init__(self, network: Network, tokenizer: CLIPTokenizer) -> None:
        super().__init__(network, network.config.vision_config.image_size)
        self.tokenizer, self.context = tokenizer, network.config.text_config.max_position_embeddings

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor]:
        """Ids [B, 77]: begin, prompt, end, padding; a long prompt is cut before its end. Always as long, so that a
        score does not depend on which prompts are beside it."""
        words = {"padding": "max_length", "truncation": True, "max_length": self.context, "return_tensors": "pt"}
        return (self.tokenizer(list(prompts), **words).input_ids,)


def vit_h(
    *, embedding: int = 1024, image: int = 224, patch: int = 14, vision_width: int = 1280, vision_layers: int = 32,
    vision_heads: int = 16, text_width: int = 1024, text_layers: int = 24, text_heads: int = 16,
    vocabulary: int = 49408, context: int = 77,
) -> CLIPConfig:  # fmt: skip
    """OpenCLIP's ViT-H/14, or of other sizes. Its gelu is the exact one, not OpenAI's quick_gelu."""
    both = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": embedding}
    vision = tower(vision_width, vision_layers, vision_heads) | {"image_size": image, "patch_size": patch}
    text = tower(text_width, text_layers, text_heads)
    text |= {"vocab_size": vocabulary, "max_position_embeddings": context, "pad_token_id": 0}
    text |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    config = CLIPConfig(text_config=text | both, vision_config=vision | both, projection_dim=embedding)
    config._attn_implementation = "sdpa"  # the eager one takes its softmax in float32
    return config


def saved_config(folder: Path) -> CLIPConfig:
    """Of a folder as transformers saves CLIP. Raises BadWeights."""
    file = folder / "config.json"
    try:
        config = CLIPConfig.from_json_file(file)
    except Exception as error:  # json, and transformers' own validation
        raise BadWeights(f"{file} is no configuration of a CLIP model: {type(error).__name__}: {error}") from error
    for part in (config, config.text_config, config.vision_config):
        part.projection_dim, part._attn_implementation = config.projection_dim, "sdpa"
    return config


def load_tokenizer(folder: Path, config: CLIPConfig) -> CLIPTokenizer:
    """CLIP's. Raises BadWeights where it is none, or its end is not where `config`'s text tower reads a text off."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # json, and whatever transformers has of its own
        raise BadWeights(f"{folder} has no vocabulary of CLIP: {type(error).__name__}: {error}") from error
    text = config.text_config
    # Old configurations say 2, and transformers then takes the highest id; of any other, a text without it is read off
    # at its beginning.
    end = text.vocab_size - 1 if text.eos_token_id == 2 else text.eos_token_id
    if (last := tokenizer.eos_token_id) != end:
        raise BadWeights(f"{folder}: this tokenizer's last token is {last}, expected CLIP's, with {end}")
    return tokenizer


def asset(key: str, source: str, *files: str) -> Asset:
    """The folder or hub id of CLIP, of which `files` are read."""
    return Asset(key, source, files, folder=True)


def load(make: type[Model], folder: Path, device: str) -> tuple[Model, CLIPTokenizer]:
    """Both towers and the tokenizer, from a folder that holds WHOLE. Raises BadWeights."""
    config, file = saved_config(folder), folder / SAVED
    network = fill(lambda: make(config), read(file), f"{file}: no CLIP", device, unused=POSITIONS)
    return network, load_tokenizer(folder, config)
