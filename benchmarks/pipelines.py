"""Pipelines with random weights, made on the spot: Stable Diffusion 1.5's size and classes, or the same ones tiny.

For plumbing and for speed, which do not depend on what the weights are; never for pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.utils import logging as transformers_logging

from diffusion import pipeline_files

TOKENS = 77
START, END = "<|startoftext|>", "<|endoftext|>"
VIT_PIXELS = 224
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

UNET: dict[str, Any] = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8,  # that is the number of heads: diffusers' name for it is wrong, and kept
    "norm_num_groups": 32,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 512,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768,
}  # fmt: skip
TINY_UNET = {
    **UNET, "sample_size": 8, "block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "cross_attention_dim": 32,
    "norm_num_groups": 8,
}  # fmt: skip
TINY_VAE = {
    **VAE, "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 64,
}  # fmt: skip
TINY_TEXT = {
    **TEXT, "vocab_size": 514, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "projection_dim": 32,
}  # fmt: skip

# ViT-H/14, what HPSv2 and PickScore judge pictures with.
VIT_H: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
    "patch_size": 14, "image_size": VIT_PIXELS, "projection_dim": 1024,
}  # fmt: skip
TINY_VIT = {
    **VIT_H, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "patch_size": 32, "projection_dim": 32,
}  # fmt: skip


def build(folder: Path, tiny: bool = False, device: str = "cpu", seed: int = 0) -> Path:
    """Write a StableDiffusionPipeline folder of Stable Diffusion 1.5's configuration with random weights, in float16.

    `tiny` has the same classes, the same four levels and factor 8 between image and latent, 8x8 latents and under two
    million numbers. Weights are drawn on `device`: some 20 s on one CPU core at full size, hardly any on a GPU. They
    are the same for a seed on one kind of device.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device != "cpu" else []):
        torch.manual_seed(seed)
        unet, vae, text_encoder = parts(tiny, device)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(), text_encoder=text_encoder.half(), tokenizer=build_tokenizer(folder / "tokenizer"),
        unet=unet.half(), scheduler=build_scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    transformers_logging.disable_progress_bar()
    pipeline_files.save(pipeline, folder)
    return folder


def build_tiny_decoder(folder: Path, tiny: bool = False, seed: int = 0) -> Path:
    """Write an AutoencoderTiny of TAESD's configuration, diffusers' default, or a narrow one with as many levels."""
    narrow = {
        "encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4,
        "num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoencoderTiny(**(narrow if tiny else {})).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["block_out_channels"]  # diffusers' own addition; the published file has none
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def parts(tiny: bool = False, device: str = "cpu") -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """The three networks with torch's default initialisation; on device "meta" without weights."""
    with torch.device(device):
        unet = UNet2DConditionModel(**(TINY_UNET if tiny else UNET))
        vae = AutoencoderKL(
            **(TINY_VAE if tiny else VAE), latent_channels=4, scaling_factor=0.18215,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        config = CLIPTextConfig(
            **(TINY_TEXT if tiny else TEXT), max_position_embeddings=TOKENS, hidden_act="quick_gelu",
            bos_token_id=512, eos_token_id=513, pad_token_id=513,
        )  # fmt: skip
        text_encoder = CLIPTextModel(config)
    return unet, vae, text_encoder


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False,
        set_alpha_to_one=False,
    )  # fmt: skip


def build_tokenizer(folder: Path, size: int = 514) -> CLIPTokenizer:
    """A CLIPTokenizer without merges: every byte of the text is a token. Writes vocab.json and merges.txt. `size`: of
    its vocabulary, filled up with words that never occur; start and end are the last two, as in CLIP's own."""
    letters = _byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [*(f"<|unused{i}|>" for i in range(len(words), size - 2)), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


def _byte_letters() -> list[str]:
    """A printable character for each of the 256 bytes, in CLIP's order: printable ones stand for themselves, the others
    for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


class StandInReward:
    """A ViT-H/14 tower with random weights and a fixed direction: costs what CLIP-like rewards cost, means nothing.

    As `reward.name=benchmarks.pipelines:StandInReward`. Prompts are not read: a text tower's features are computed
    once a prompt. Scores are cosines, in [-1, 1].
    """

    differentiable = True

    def __init__(self, tiny: bool = False, seed: int = 0) -> None:
        self._config, self._seed = CLIPVisionConfig(**(TINY_VIT if tiny else VIT_H)), seed
        self._tower: CLIPVisionModelWithProjection | None = None

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> [B] float32."""
        if self._tower is None:  # built where the images are
            with torch.random.fork_rng(), torch.device(images.device):
                torch.manual_seed(self._seed)
                self._tower = CLIPVisionModelWithProjection(self._config).requires_grad_(False).eval()
                self._direction = torch.nn.functional.normalize(torch.randn(self._config.projection_dim), dim=0)
                self._mean, self._std = (torch.tensor(v).reshape(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        size = (VIT_PIXELS, VIT_PIXELS)
        small = torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        features = self._tower(pixel_values=(small - self._mean) / self._std).image_embeds
        return torch.nn.functional.normalize(features, dim=1) @ self._direction
