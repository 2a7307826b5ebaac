"""Networks of public models' sizes with random weights, made on the device from their configurations (configs/models),
as the project's own base models: without text encoders, whose embeddings are random. For speed and memory alone."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.gpu_worker import Day, Skipped
from commands.networks import TOKENS
from diffusion import lora
from diffusion.base_model import BaseModel
from diffusion.families import Family
from diffusion.locate import PUBLISHED, family_of
from diffusion.open_model import class_of
from diffusion.parts import without_weights
from diffusion.rehearsal import embedding_width
from learner import build
from learner.config import ROOT, Config, load_config
from learner.update import Learner

PROMPT = "a cat"
SPARE = 1.15  # of a network's bytes, in free memory, for it to be tried: its LoRA, and one sample
# What makes a published configuration tiny, part by part; what a family does not have is left out.
TINY_CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 16, "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 32,
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
    "transformer": {
        "sample_size": 16, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 40, "caption_projection_dim": 32, "pooled_projection_dim": 16,
        "axes_dims_rope": [4, 6, 6], "dual_attention_layers": [0],
    },
    "vae": {"layers_per_block": 1, "norm_num_groups": 8, "sample_size": 128},
    "text_encoder": {**TINY_CLIP, "projection_dim": 16}, "text_encoder_2": {**TINY_CLIP, "projection_dim": 16},
    "text_encoder_3": {"d_model": 40, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2},
}  # fmt: skip
TINY_T5 = TINY["text_encoder_3"]


@dataclass
class Opened:
    """A base model with its LoRA, and what goes with it."""

    config: Config
    family: Family
    model: BaseModel
    vae: Any


def configured(day: Day, preset: str, *more: str) -> Config:
    """The preset over the published configuration's folder, an epoch of one chunk of one prompt."""
    base = load_config(ROOT / f"configs/{preset}.yaml")
    folder = tiny(PUBLISHED / base.model.path) if day.tiny else PUBLISHED / base.model.path
    small = ["model.pixels=128", "model.text_tokens=8", "lora.rank=2", "flow.widths=[8,16]"] if day.tiny else []
    settings = [
        f"model.path={folder}", f"model.device={day.device.type}", f"prompts.path=[{PROMPT}]", "evaluation.images=0",
        "run.runner=inprocess", "sampler.steps=4", "train.updates_per_epoch=1", *of_batch(4), *small,
        *more,
    ]  # fmt: skip
    return load_config(ROOT / f"configs/{preset}.yaml", settings)


def of_batch(count: int) -> list[str]:
    return [f"{key}={count}" for key in ("sampler.chunk_size", "prompts.per_prompt", "train.trajectories")]


def tiny(published: Path) -> Path:
    """The same pipeline with small networks, in a folder that is there as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-", dir=_root())) / published.name
    shutil.copytree(published, folder)
    for file in folder.glob("*/config.json"):
        config, changes = json.loads(file.read_text()), dict(TINY[file.parent.name])
        if config.get("architectures") == ["T5EncoderModel"]:
            changes = TINY_T5
        if (levels := config.get("block_out_channels")) is not None:
            changes["block_out_channels"] = [16, 16] if file.parent.name == "unet" else [8] * len(levels)
        if file.parent.name == "unet":  # of its levels the first and the last
            changes |= {key: [config[key][0], config[key][-1]] for key in ("down_block_types", "up_block_types")}
            changes |= {"attention_head_dim": 2, "transformer_layers_per_block": 1}
        config |= {key: value for key, value in changes.items() if key in config or key == "norm_num_groups"}
        file.write_text(json.dumps(config))
    return folder


_folders: list[tempfile.TemporaryDirectory[str]] = []


def _root() -> str:
    if not _folders:
        _folders.append(tempfile.TemporaryDirectory())
    return _folders[0].name


def open_model(day: Day, config: Config) -> Opened:
    """Raises Skipped where the network does not fit into free memory."""
    path, dtype = config.model.path, getattr(torch, config.model.dtype)
    network, vae = without_weights(path)
    family, numbers = family_of(path), sum(p.numel() for p in network.parameters())
    wanted = SPARE * numbers * dtype.itemsize
    if day.cuda and wanted > (free := torch.cuda.mem_get_info(day.device)[0]):
        raise Skipped(
            f"{numbers / 1e9:.3g} B parameters in {config.model.dtype} need {wanted / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free"
        )
    model = class_of(path)(
        path, day.device.type, dtype, config.model.pixels, config.model.text_tokens,
        embedded=embeddings(config, family, embedding_width(network) or 0), network=False,
    )  # fmt: skip
    model.unet = random_weights(network, day.device, dtype).requires_grad_(False).eval()
    rank, alpha = config.lora.rank, config.lora.alpha or config.lora.rank
    model.attach_lora(rank, alpha, 0, lora.TARGETS[config.lora.targets])
    model.speed_up(config.model.channels_last, False, config.learner.gradient_checkpointing)
    vae = random_weights(vae, day.device, dtype).requires_grad_(False).eval()
    return Opened(config, family, model, vae)


def random_weights(network: Any, device: torch.device, dtype: torch.dtype, scale: float = 0.02) -> Any:
    """A network on the meta device, on `device`: matrices of small normal numbers, vectors that leave what they
    multiply."""
    network = nn.Module.to(network, dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.dim() > 1 and tensor.is_floating_point():
                tensor.normal_(0, min(scale, 1 / math.sqrt(tensor[0].numel())), generator=generator)
            else:
                tensor.zero_()
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.fill_(1)
    return network


def embeddings(config: Config, family: Family, width: int) -> dict[str, np.ndarray]:
    """Rows of the prompt and of the empty one, as many as the pipeline has them (see commands/networks.py)."""
    t5 = family.t5_tokens and (config.model.text_tokens or family.t5_tokens)
    rows = TOKENS * (family.name != "flux") + t5 + (family.name != "base_model")
    draws = np.random.default_rng(0)
    return {prompt: draws.standard_normal((rows, width), np.float32) for prompt in (PROMPT, "")}


def new_learner(opened: Opened) -> Learner:
    flow = build.flow_network(opened.config, opened.model.latent_shape, opened.model.embedding_width)
    return Learner(opened.model, flow, opened.config)


def plain_pipeline(opened: Opened) -> Any:
    """diffusers' own, around the same network with the same LoRA; called with embeddings."""
    import diffusers

    model, family = opened.model, opened.family
    kind = getattr(diffusers, family.pipelines[0])
    parts: dict[str, Any] = dict.fromkeys(name for name in family.all_parts if name not in ("unet", "transformer"))
    parts |= {family.network: model.unet, "vae": opened.vae, "scheduler": model.scheduler}
    if family.name == "base_model":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_call(opened: Opened, prompts: Sequence[str]) -> dict[str, Any]:
    """Arguments of its call for latents, with the work of the project's rollout."""
    config, model, family = opened.config, opened.model, opened.family
    rows, empty = (model.embed(texts).to(model.dtype) for texts in (prompts, [""] * len(prompts)))
    side = model.latent_shape[1] * 2 ** (len(opened.vae.config.block_out_channels) - 1)
    told: dict[str, Any] = {
        "num_inference_steps": config.sampler.steps, "guidance_scale": config.sampler.guidance, "height": side,
        "width": side, "output_type": "latent", "prompt_embeds": rows,
    }  # fmt: skip
    if not family.distilled:
        told["negative_prompt_embeds"] = empty
    if not family.flow:
        told["eta"] = config.sampler.eta
    if family.name != "base_model":  # the last row is the pooled one, filled up
        unet = model.unet.config
        width = unet.get("pooled_projection_dim") or (
            unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        )
        told |= {"prompt_embeds": rows[:, :-1], "pooled_prompt_embeds": rows[:, -1, :width]}
        if not family.distilled:
            told["negative_prompt_embeds"] = empty[:, :-1]
            told["negative_pooled_prompt_embeds"] = empty[:, -1, :width]
    return told
