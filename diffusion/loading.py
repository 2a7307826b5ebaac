"""What `model.path` names, looked at without loading weights: before a run, and for counting."""

from __future__ import annotations

from typing import Any

import torch

from diffusion.kernels import DDIMKernel
from diffusion.locate import TINY_DECODER, BaseModelError, is_unconditional, load_errors, locate, part_config
from diffusion.settings import Grid


def load_kernel(path: str, num_steps: int, eta: float, grid: Grid = "ddim") -> DDIMKernel:
    """The kernel of a pipeline's scheduler. Raises BaseModelError as `is_unconditional`, ValueError as DDIMKernel."""
    from diffusers import DDIMScheduler

    with load_errors(path):
        scheduler = DDIMScheduler.from_config(part_config(path, "scheduler"))
    return DDIMKernel.from_scheduler(scheduler, num_steps, eta, grid)


def check_parts(path: str) -> None:
    """Read the configurations of U-Net, VAE and text encoder. Raises BaseModelError as load_kernel, or for an
    unconditional U-Net of a kind that cannot be trained here."""
    unet = part_config(path, "unet")
    if not is_unconditional(path):
        for name in ("vae", "text_encoder"):
            part_config(path, name)
        return
    wanted = {"in_channels": 3, "out_channels": 3, "num_class_embeds": None, "class_embed_type": None}
    faults = [f"its {key} is {unet[key]}, not {good}" for key, good in wanted.items() if unet.get(key, good) != good]
    if not isinstance(unet.get("sample_size"), int):
        faults.append("its sample_size is no single number")
    blocks = [*unet.get("down_block_types", ()), *unet.get("up_block_types", ())]
    if not unet.get("add_attention", True) and not any("Attn" in block for block in blocks):
        faults.append("it has no attention for a LoRA to adapt")
    if faults:
        raise BaseModelError(f"model.path: the U-Net of {path} cannot be used: {', '.join(faults)}")


def check_tiny_decoder(path: str, pipeline: str) -> None:
    """Raises BaseModelError if it is no AutoencoderTiny, or decodes other latents than the pipeline's."""
    tiny, vae = tiny_without_weights(path).config, without_weights(pipeline)[1]
    if vae is None:
        raise BaseModelError(f"objective.forward_looking_decoder: {pipeline} has no VAE that a tiny one could spare")
    tiny_shape = tiny.latent_channels, 2 ** (len(tiny.decoder_block_out_channels) - 1)
    shape = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if tiny_shape != shape:
        raise BaseModelError(
            f"model.tiny_decoder: {path} decodes (channels, magnification) {tiny_shape}, the VAE of {pipeline} {shape}"
        )


def tiny_without_weights(path: str) -> Any:
    """The AutoencoderTiny on torch's meta device. Raises as check_tiny_decoder."""
    from diffusers import AutoencoderTiny

    folder = locate(path, *TINY_DECODER)
    with load_errors(path, TINY_DECODER[1]), torch.device("meta"):
        return AutoencoderTiny.from_config(AutoencoderTiny.load_config(folder))


def without_weights(path: str) -> tuple[Any, Any]:
    """U-Net and VAE (None if there is none) on torch's meta device, for counting. Raises BaseModelError."""
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

    unet, vae = part_config(path, "unet"), None if is_unconditional(path) else part_config(path, "vae")
    with load_errors(path), torch.device("meta"):
        if vae is None:
            return UNet2DModel.from_config(unet), None
        return UNet2DConditionModel.from_config(unet), AutoencoderKL.from_config(vae)
