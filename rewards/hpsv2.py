"""Human Preference Score v2 (arXiv 2306.09341, github.com/tgxs002/HPSv2): how well people would prefer a picture for
its prompt. The cosine of OpenCLIP ViT-H/14's embeddings of both, in [-1, 1]; a prompt's first 75 tokens count."""

import html
import re
from collections.abc import Sequence
from typing import Any

import ftfy
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPModel

from rewards.network import NetworkReward, Published, Sizes, fill, long_side, tower
from rewards.weights import HPS_FILES, Asset, BadWeights, find, read

TOKENIZER = "openai/clip-vit-large-patch14"  # OpenCLIP uses the same vocabulary
# What begins and ends a text is written in another way by OpenCLIP, to which transformers' way is mere letters.
MARKS = (
    ("<|startoftext|>", "<| startoftext |>"), ("<|endoftext|>", "<| endoftext |>"),
    ("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>"),
)  # fmt: skip
# From the names of `Network`'s tensors to OpenCLIP's, in this order.
NAMES = (
    ("vision_model.", "visual."), ("text_model.", ""), ("embeddings.patch_embedding.", "conv1."),
    ("embeddings.class_embedding", "class_embedding"), ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"), ("encoder.layers", "transformer.resblocks"),
    (".self_attn.out_proj.", ".attn.out_proj."), (".layer_norm", ".ln_"), (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."), ("pre_layrnorm.", "ln_pre."), ("post_layernorm.", "ln_post."),
    ("final_layer_norm.", "ln_final."), ("visual_projection.weight", "visual.proj"),
    ("text_projection.weight", "text_projection"),
)  # fmt: skip
QKV = re.compile(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)")


def clip_config(
    *, embedding: int = 1024, image: int = 224, patch: int = 14, vision_width: int = 1280, vision_layers: int = 32,
    vision_heads: int = 16, text_width: int = 1024, text_layers: int = 24, text_heads: int = 16,
    vocabulary: int = 49408, context: int = 77,
) -> CLIPConfig:  # fmt: skip
    """OpenCLIP's ViT-H/14, or of other sizes. Its gelu is the exact one, not OpenAI's quick_gelu. A prompt is read off
    at the highest token id."""
    both = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "projection_dim": embedding}
    vision = tower(vision_width, vision_layers, vision_heads) | {"image_size": image, "patch_size": patch}
    text = tower(text_width, text_layers, text_heads)
    text |= {"vocab_size": vocabulary, "max_position_embeddings": context, "pad_token_id": 0}
    text |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    config = CLIPConfig(text_config=text | both, vision_config=vision | both, projection_dim=embedding)
    config._attn_implementation = "sdpa"  # the eager one takes its softmax in float32
    return config


class Network(CLIPModel):
    """Normalised pixels [B, 3, S, S] and token ids [B, 77] -> cosines [B]."""

    def forward(self, pixels: Tensor, ids: Tensor) -> Tensor:  # type: ignore[override]
        picture = self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output)
        prompt = self.text_projection(self.text_model(input_ids=ids).pooler_output)
        return (F.normalize(picture, dim=-1) * F.normalize(prompt, dim=-1)).sum(-1)


class HPSv2(NetworkReward):
    name = "hpsv2"
    resize = staticmethod(long_side)

    @staticmethod
    def assets(
        weights: str | None = None, *, version: str = "v2.1", tokenizer: str = TOKENIZER, size: Sizes = None
    ) -> list[Asset]:
        """What is read: `weights`, by default of `version`, and CLIP's `tokenizer`, a folder or hub id. `size`: of
        `clip_config`, where it is not the published one. Raises ValueError or TypeError for others."""
        clip_config(**size or {})
        if version not in HPS_FILES:
            raise ValueError(f"reward.options.version: {version!r}, expected {' or '.join(HPS_FILES)}")
        return [
            Asset("reward.weights", weights or f"xswu/HPSv2:{HPS_FILES[version]}", (HPS_FILES[version],)),
            Asset("reward.options.tokenizer", tokenizer, ("vocab.json", "merges.txt"), folder=True),
        ]

    def __init__(self, weights: str | None = None, device: str = "cpu", *, size: Sizes = None, **options: Any) -> None:
        """As `assets`. Raises WeightsNotFound, BadWeights."""
        file, folder = find(self.assets(weights, size=size, **options))
        config = clip_config(**size or {})
        state, what = read(file, inside="state_dict"), f"{file}: no HPSv2"
        network = fill(lambda: Network(config), state, what, device, published)
        super().__init__(network, config.vision_config.image_size)
        self.tokenizer, self.context = CLIPTokenizer.from_pretrained(folder), config.text_config.max_position_embeddings
        if (last := self.tokenizer.eos_token_id) != (eos := config.text_config.eos_token_id):
            raise BadWeights(f"{folder}: this tokenizer's last token is {last}, expected CLIP's, with {eos}")

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor]:
        """Ids [B, 77] as OpenCLIP makes them: begin, prompt, end, zeros; a long prompt is cut before its end."""
        cleaned = [clean(prompt) for prompt in prompts]
        cut = self.tokenizer(cleaned, truncation=True, max_length=self.context).input_ids
        return (torch.tensor([ids + [0] * (self.context - len(ids)) for ids in cut]),)


def clean(prompt: str) -> str:
    """A prompt as OpenCLIP cleans it before tokenizing: mended by ftfy, no html entities, single spaces, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    text = re.sub(r"\s+", " ", text).strip().lower()
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
