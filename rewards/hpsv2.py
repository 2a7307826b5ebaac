"""Human Preference Score v2: the cosine of OpenCLIP ViT-H/14's embeddings of picture and prompt, in [-1, 1].

Wu et al. 2023, arXiv 2306.09341; github.com/tgxs002/HPSv2.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPModel

from rewards.network import NetworkReward, Published, fill, long_side
from rewards.weights import HPS_FILES, Asset, BadWeights, find, read

TOKENIZER = "openai/clip-vit-large-patch14"  # OpenCLIP uses the same vocabulary

# What ftfy.fix_text does to a prompt before OpenCLIP reads it, but for mending wrongly decoded text.
STRAIGHT = str.maketrans(
    dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'") | dict.fromkeys("\u201c\u201d\u201e\u201f", '"')
)
WIDE_OR_JOINED = (
    [0x3000, 0x132, 0x133], range(0x1C4, 0x1CD), range(0x1F1, 0x1F4), range(0xFB00, 0xFB07), range(0xFF01, 0xFFF0),
)  # fmt: skip
PLAIN = {code: unicodedata.normalize("NFKC", chr(code)) for codes in WIDE_OR_JOINED for code in codes}
PLAIN |= {code: bytes([code]).decode("cp1252", "ignore") or chr(code) for code in range(0x80, 0xA0)}
PLAIN |= {0x149: "\u02bcn", 0xFB05: "\u017ft"}
# What begins and ends a text is written in another way by OpenCLIP, to which transformers' way is mere letters.
MARKS = (
    ("<|startoftext|>", "<| startoftext |>"), ("<|endoftext|>", "<| endoftext |>"),
    ("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>"),
)  # fmt: skip
UNSEEN = re.compile("\033\\[[\\d;]*[a-zA-Z]|[\0-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")
# From the names of `Network`'s tensors to OpenCLIP's, in this order.
NAMES = (
    ("clip.", ""), ("vision_model.", "visual."), ("text_model.", ""), ("embeddings.patch_embedding.", "conv1."),
    ("embeddings.class_embedding", "class_embedding"), ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"), ("encoder.layers", "transformer.resblocks"),
    (".self_attn.out_proj.", ".attn.out_proj."), (".layer_norm", ".ln_"), (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."), ("pre_layrnorm.", "ln_pre."), ("post_layernorm.", "ln_post."),
    ("final_layer_norm.", "ln_final."), ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
)  # fmt: skip
QKV = re.compile(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)")


@dataclass(frozen=True)
class Size:
    """OpenCLIP's ViT-H/14; the MLPs are four times as wide."""

    embedding: int = 1024
    image: int = 224
    patch: int = 14
    vision_width: int = 1280
    vision_layers: int = 32
    vision_heads: int = 16
    text_width: int = 1024
    text_layers: int = 24
    text_heads: int = 16
    vocabulary: int = 49408
    context: int = 77

    def config(self) -> CLIPConfig:
        """OpenCLIP's gelu is the exact one, not OpenAI's quick_gelu. A prompt is read off at the highest token id."""
        vision = {
            "hidden_size": self.vision_width, "intermediate_size": 4 * self.vision_width,
            "num_hidden_layers": self.vision_layers, "num_attention_heads": self.vision_heads,
            "image_size": self.image, "patch_size": self.patch,
        }  # fmt: skip
        text = {
            "hidden_size": self.text_width, "intermediate_size": 4 * self.text_width,
            "num_hidden_layers": self.text_layers, "num_attention_heads": self.text_heads,
            "vocab_size": self.vocabulary, "max_position_embeddings": self.context,
            "bos_token_id": self.vocabulary - 2, "eos_token_id": self.vocabulary - 1, "pad_token_id": 0,
        }  # fmt: skip
        both = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": self.embedding}
        return CLIPConfig(
            text_config=text | both, vision_config=vision | both, projection_dim=self.embedding,
            attn_implementation="sdpa",  # the eager one takes its softmax in float32
        )  # fmt: skip


class Network(nn.Module):
    """Normalised pixels [B, 3, S, S] and token ids [B, 77] -> cosines [B]."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.clip = CLIPModel(config)

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:
        picture = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        prompt = self.clip.text_projection(self.clip.text_model(input_ids=ids).pooler_output)
        return (F.normalize(picture, dim=-1) * F.normalize(prompt, dim=-1)).sum(-1)


class HPSv2(NetworkReward):
    """How well people would prefer a picture for its prompt, whose first 75 tokens count."""

    name = "hpsv2"
    resize = staticmethod(long_side)

    @staticmethod
    def assets(
        weights: str | None = None, *, version: str = "v2.1", tokenizer: str = TOKENIZER,
        size: dict[str, int] | None = None,
    ) -> list[Asset]:  # fmt: skip
        """What is read: `weights`, the checkpoint, by default that of `version`, and `tokenizer`, CLIP's, a folder or
        hub id. `size` changes fields of `Size`, for other sizes than the published one.

        Raises:
            ValueError: no such version.
            TypeError: `size` has other fields.
        """
        Size(**size or {})
        if version not in HPS_FILES:
            raise ValueError(f"reward.options.version: {version!r}, expected {' or '.join(HPS_FILES)}")
        words = ("tokenizer.json|vocab.json", "merges.txt?", "tokenizer_config.json?")
        return [
            Asset("reward.weights", weights or f"xswu/HPSv2:{HPS_FILES[version]}", (HPS_FILES[version],)),
            Asset("reward.options.tokenizer", tokenizer, words, folder=True),
        ]

    def __init__(self, weights: str | None = None, device: str = "cpu", **options: Any) -> None:
        """`weights` and `options`: those of `assets`.

        Raises:
            WeightsNotFound, BadWeights: see there.
            ValueError, TypeError: as `assets`.
        """
        file, folder = find(self.assets(weights, **options))
        self.size = Size(**options.get("size") or {})
        with torch.device("meta"):
            network = Network(self.size.config())
        fill(network, read(file, inside="state_dict"), f"{file}: no HPSv2", device, published)
        super().__init__(network, self.size.image)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        if (last := self.tokenizer.eos_token_id) != self.size.vocabulary - 1:
            raise BadWeights(
                f"{folder}: this tokenizer's last token is {last}, expected CLIP's, with {self.size.vocabulary - 1}"
            )

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor]:
        """Ids [B, 77] as OpenCLIP makes them: begin, prompt, end, zeros; a long prompt is cut before its end."""
        cut = self.tokenizer(
            [clean(prompt) for prompt in prompts], truncation=True, max_length=self.size.context
        ).input_ids
        return (torch.tensor([ids + [0] * (self.size.context - len(ids)) for ids in cut]),)


def clean(prompt: str) -> str:
    """A prompt as OpenCLIP cleans it before tokenizing: plain quotes, widths and ligatures, no html entities, lower
    case, single spaces.
    """
    text = UNSEEN.sub("", prompt if "<" in prompt else html.unescape(prompt))
    text = unicodedata.normalize("NFC", text.translate(PLAIN).translate(STRAIGHT))
    text = re.sub(r"\s+", " ", html.unescape(html.unescape(text)).strip()).strip().lower()
    for written, meant in MARKS:
        text = text.replace(written, meant)
    return text


def published(key: str) -> Published:
    """OpenCLIP has q, k and v in one tensor, and its projections multiply from the right."""
    for ours, theirs in NAMES:
        key = key.replace(ours, theirs)
    if attention := QKV.fullmatch(key):
        block, letter, kind = attention.groups()
        return Published(f"{block}.attn.in_proj_{kind}", "qkv".index(letter))
    return Published(key, transposed=key in ("visual.proj", "text_projection"))
