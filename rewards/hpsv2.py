"""Human Preference Score v2 (arXiv 2306.09341, github.com/tgxs002/HPSv2): how well people would prefer a picture for
its prompt. The cosine of OpenCLIP ViT-H/14's embeddings of both, in [-1, 1]; a prompt's first 75 tokens count."""

import html
import re
from collections.abc import Sequence
from typing import Any

import ftfy
import torch
from torch import Tensor

from rewards import clip
from rewards.network import NetworkReward, Published, Sizes, fill, long_side
from rewards.weights import HPS_FILES, Asset, find, read

# What begins and ends a text is written in another way by OpenCLIP, to which transformers' way is mere letters.
MARKS = (
    ("<|startoftext|>", "<| startoftext |>"), ("<|endoftext|>", "<| endoftext |>"),
    ("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>"),
)  # fmt: skip
# From the names of `clip.Network`'s tensors to OpenCLIP's, in this order.
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


class HPSv2(NetworkReward):
    name = "hpsv2"
    resize = staticmethod(long_side)

    @staticmethod
    def assets(
        weights: str | None = None, *, version: str = "v2.1", tokenizer: str = clip.CLIP, size: Sizes = None
    ) -> list[Asset]:
        """What is read: `weights`, by default of `version`, and CLIP's `tokenizer`, a folder or hub id. `size`: of
        `clip.vit_h`, where it is not the published one. Raises ValueError or TypeError for others."""
        clip.vit_h(**size or {})
        if version not in HPS_FILES:
            raise ValueError(f"reward.options.version: {version!r}, expected {' or '.join(HPS_FILES)}")
        return [
            Asset("reward.weights", weights or f"xswu/HPSv2:{HPS_FILES[version]}", (HPS_FILES[version],)),
            clip.asset("reward.options.tokenizer", tokenizer, *clip.WORDS),  # OpenCLIP's are the same
        ]

    def __init__(self, weights: str | None = None, device: str = "cpu", *, size: Sizes = None, **options: Any) -> None:
        """As `assets`. Raises WeightsNotFound, BadWeights."""
        file, folder = find(self.assets(weights, size=size, **options))
        config = clip.vit_h(**size or {})
        state, what = read(file, inside="state_dict"), f"{file}: no HPSv2"
        network = fill(lambda: clip.Network(config), state, what, device, published)
        super().__init__(network, config.vision_config.image_size)
        self.tokenizer, self.context = clip.load_tokenizer(folder, config), config.text_config.max_position_embeddings

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
