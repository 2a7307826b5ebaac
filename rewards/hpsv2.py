"""Human Preference Score v2: the cosine of OpenCLIP ViT-H/14's embeddings of picture and prompt, in [-1, 1].

Wu et al. 2023, arXiv 2306.09341; github.com/tgxs002/HPSv2.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPModel

from rewards import preprocess
from rewards.network import check_keys, fill, full_precision, match, on_meta, pair, shapes_of
from rewards.weights import Asset, BadWeights, find, read

FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
REPOSITORY = "xswu/HPSv2"
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


class HPSv2:
    """How well people would prefer a picture for its prompt."""

    name = "hpsv2"
    differentiable = True

    @staticmethod
    def assets(
        weights: str | None = None, *, version: str = "v2.1", tokenizer: str = TOKENIZER,
        size: dict[str, int] | None = None,
    ) -> list[Asset]:  # fmt: skip
        """What `__init__` reads.

        Raises:
            ValueError: no such version.
            TypeError: `size` has other fields.
        """
        Size(**size or {})
        if version not in FILES:
            raise ValueError(f"reward.options.version: {version!r}, expected {' or '.join(FILES)}")
        return [
            Asset("reward.weights", weights or f"{REPOSITORY}:{FILES[version]}", (FILES[version],)),
            Asset(
                "reward.options.tokenizer", tokenizer,
                ("tokenizer.json|vocab.json", "merges.txt?", "tokenizer_config.json?"), folder=True,
            ),
        ]  # fmt: skip

    def __init__(
        self, weights: str | None = None, device: str = "cpu", *, version: str = "v2.1", tokenizer: str = TOKENIZER,
        size: dict[str, int] | None = None,
    ) -> None:  # fmt: skip
        """`weights`: the checkpoint, by default that of `version`; `tokenizer`: CLIP's, a folder or hub id. `size`
        changes fields of `Size`, for other sizes than the published one.

        Raises:
            WeightsNotFound, BadWeights: see there.
            ValueError, TypeError: as `assets`.
        """
        file, folder = find(self.assets(weights, version=version, tokenizer=tokenizer, size=size))
        self.size = Size(**size or {})
        network = on_meta(lambda: Network(self.size.config()))
        state = read(file, inside="state_dict")
        check_keys(shapes_of(state), layout(self.size), f"{file}: no HPSv2")
        self.network = fill(network, rename(state), file, device)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        if self.tokenizer.eos_token_id != self.size.vocabulary - 1:
            raise BadWeights(
                f"{folder}: this tokenizer's last token is {self.tokenizer.eos_token_id}, expected CLIP's, with "
                f"{self.size.vocabulary - 1}"
            )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B prompts (their first 75 tokens count) -> [B], with autograd to the
        images.
        """
        match(images, prompts)
        weight = next(self.network.parameters())
        pixels = preprocess.long_side(images, self.size.image).to(weight.device, weight.dtype)
        with full_precision(weight.device):
            return self.network(pixels, self.tokens(prompts).to(weight.device))

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Ids [B, 77] as OpenCLIP makes them: begin, prompt, end, zeros; a long prompt is cut before its end."""
        cut = self.tokenizer(
            [clean(prompt) for prompt in prompts], truncation=True, max_length=self.size.context
        ).input_ids
        return torch.tensor([ids + [0] * (self.size.context - len(ids)) for ids in cut])


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


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's tensors under the names of `Network`: q, k and v apart, projections transposed for nn.Linear."""
    renamed = {}
    for key, tensor in state.items():
        name = key.removeprefix("visual.")
        tower = "clip.text_model" if name == key else "clip.vision_model"
        if name in TOPS:
            renamed[f"clip.{TOPS[name]}"] = tensor if tensor.ndim == 0 else tensor.T
        elif name.endswith((".attn.in_proj_weight", ".attn.in_proj_bias")):
            block, _, kind = name.rpartition(".attn.in_proj_")
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{tower}.{block.replace(*LAYERS)}.self_attn.{letter}_proj.{kind}"] = part
        else:
            for old, new in (LAYERS, *PARTS):
                name = name.replace(old, new)
            renamed[f"{tower}.{name}"] = tensor
    return renamed


TOPS = {"proj": "visual_projection.weight", "text_projection": "text_projection.weight", "logit_scale": "logit_scale"}
LAYERS = ("transformer.resblocks", "encoder.layers")
PARTS = (
    (".attn.out_proj.", ".self_attn.out_proj."), (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."), ("ln_pre.", "pre_layrnorm."),
    ("ln_post.", "post_layernorm."), ("ln_final.", "final_layer_norm."), ("conv1.", "embeddings.patch_embedding."),
    ("class_embedding", "embeddings.class_embedding"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("token_embedding.", "embeddings.token_embedding."),
)  # fmt: skip


def layout(size: Size) -> dict[str, tuple[int, ...]]:
    """Every key of the published checkpoints and its shape: 686 of them at the published size."""
    seen, read = size.vision_width, size.text_width
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (size.context, read),
        "text_projection": (read, size.embedding),
        "token_embedding.weight": (size.vocabulary, read),
        **pair("ln_final", read),
        "visual.class_embedding": (seen,),
        "visual.positional_embedding": ((size.image // size.patch) ** 2 + 1, seen),
        "visual.proj": (seen, size.embedding),
        "visual.conv1.weight": (seen, 3, size.patch, size.patch),
        **pair("visual.ln_pre", seen),
        **pair("visual.ln_post", seen),
    }
    for tower, width, layers in (("visual.", seen, size.vision_layers), ("", read, size.text_layers)):
        for index in range(layers):
            block = f"{tower}transformer.resblocks.{index}"
            shapes |= pair(f"{block}.ln_1", width) | pair(f"{block}.ln_2", width)
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= pair(f"{block}.attn.out_proj", width, width)
            shapes |= pair(f"{block}.mlp.c_fc", 4 * width, width) | pair(f"{block}.mlp.c_proj", width, 4 * width)
    return shapes
