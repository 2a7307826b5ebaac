"""What `model.path` names, looked at without loading weights: before a run, and for counting."""

from __future__ import annotations

from typing import Any

import torch

from diffusion.kernels import DDIMKernel
from diffusion.locate import BaseModelError, is_unconditional, load_errors, locate, part_config
from diffusion.settings import Grid


def load_kernel(path: str, num_steps: int, eta: float, grid: Grid = "ddim") -> DDIMKernel:
    """The kernel of a pipeline's scheduler.

    Raises:
        BaseModelError: the path is no pipeline folder and the hub does not have it (or cannot be reached).
        ValueError: as DDIMKernel.
    """
    from diffusers import DDIMScheduler

    config = part_config(path, "scheduler")
    with load_errors(path):
        scheduler = DDIMScheduler.from_config(config)
    return DDIMKernel.from_scheduler(scheduler, num_steps, eta, grid)


def check_parts(path: str) -> None:
    """Read the configurations of U-Net, VAE and text encoder, but no weights.

    Raises:
        BaseModelError: as load_kernel, or an unconditional U-Net of a kind that cannot be trained here.
    """
    unet = part_config(path, "unet")
    if not is_unconditional(path):
        for name in ("vae", "text_encoder"):
            part_config(path, name)
        return
    blocks = [*unet.get("down_block_types", ()), *unet.get("up_block_types", ())]
    faults = {
        "its sample_size is no single number": not isinstance(unet.get("sample_size"), int),
        "it does not map 3 channels to 3": (unet.get("in_channels"), unet.get("out_channels")) != (3, 3),
        "it wants class labels": unet.get("num_class_embeds") or unet.get("class_embed_type"),
        "it has no attention for a LoRA to adapt": not unet.get("add_attention", True)
        and not any("Attn" in block for block in blocks),
    }
    for fault in (fault for fault, present in faults.items() if present):
        raise BaseModelError(f"model.path: the U-Net of {path} cannot be used: {fault}")


def check_tiny_decoder(path: str, pipeline: str) -> None:
    """Read its configuration, but no weights.

    Raises:
        BaseModelError: it is neither a folder nor a hub id of an AutoencoderTiny, or decodes other latents than the
            pipeline's.
    """
    tiny = tiny_without_weights(path).config
    if is_unconditional(pipeline):
        raise BaseModelError(
            f"objective.forward_looking_decoder: {pipeline} has no decoder that a tiny one could spare"
        )
    full = without_weights(pipeline)[1].config
    levels = tiny.decoder_block_out_channels, full.block_out_channels
    shapes = [(each.latent_channels, 2 ** (len(level) - 1)) for each, level in zip((tiny, full), levels, strict=True)]
    if shapes[0] != shapes[1]:
        raise BaseModelError(
            f"model.tiny_decoder: {path} decodes latents of {shapes[0][0]} channels to {shapes[0][1]} times their "
            f"side, {pipeline} has {shapes[1][0]} channels and {shapes[1][1]} times"
        )


def tiny_without_weights(path: str) -> Any:
    """The AutoencoderTiny on torch's meta device. Raises as check_tiny_decoder."""
    from diffusers import AutoencoderTiny

    folder = locate(path, "config.json", "model.tiny_decoder")
    with load_errors(path, "model.tiny_decoder", "an AutoencoderTiny folder"), torch.device("meta"):
        return AutoencoderTiny.from_config(AutoencoderTiny.load_config(folder))


def without_weights(path: str) -> tuple[Any, Any]:
    """U-Net and VAE (None if there is none) on torch's meta device, for counting. Raises as load_kernel."""
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

    unet, vae = part_config(path, "unet"), None if is_unconditional(path) else part_config(path, "vae")
    with load_errors(path), torch.device("meta"):
        if vae is None:
            return UNet2DModel.from_config(unet), None
        return UNet2DConditionModel.from_config(unet), AutoencoderKL.from_config(vae)
