"""Opens what `model.path` names, whichever kind of pipeline it is: the model, the decoder, or only their shapes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from transformers import AutoConfig

from diffusion.base_model import BaseModel, Decoder
from diffusion.kernels import DDIMKernel
from diffusion.locate import BaseModelError, is_unconditional, load_errors, locate, part
from diffusion.settings import Grid
from diffusion.unconditional import AdaptableUNet2D, PixelDecoder, UnconditionalModel


def load_model(path: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> BaseModel:
    """The U-Net, and what turns prompts into its embeddings.

    Raises:
        BaseModelError: the path is no pipeline folder and the hub does not have it (or cannot be reached).
    """
    return (UnconditionalModel if is_unconditional(path) else BaseModel)(path, device, dtype)


def load_decoder(path: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder | PixelDecoder:
    """What turns states into images. Raises as load_model."""
    return PixelDecoder(device) if is_unconditional(path) else Decoder(path, device, dtype)


def load_kernel(path: str, num_steps: int, eta: float, grid: Grid = "ddim") -> DDIMKernel:
    """The kernel of a pipeline's scheduler, without loading any weights (see check_parts).

    Raises:
        BaseModelError: as load_model.
        ValueError: as DDIMKernel.
    """
    folder, subfolder = part(path, "scheduler") if is_unconditional(path) else (locate(path), "scheduler")
    with load_errors(path):
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder=subfolder)
    return DDIMKernel.from_scheduler(scheduler, num_steps, eta, grid)


def check_parts(path: str) -> None:
    """Read the configurations of U-Net, VAE and text encoder, but no weights (of an unconditional model on the hub all
    is fetched).

    Raises:
        BaseModelError: as load_model, or an unconditional U-Net of a kind that cannot be trained here.
    """
    unet, _ = _configs(path)
    if not is_unconditional(path):
        with load_errors(path):
            AutoConfig.from_pretrained(locate(path), subfolder="text_encoder")
        return
    blocks = [*unet["down_block_types"], *unet["up_block_types"]]
    faults = {
        "its sample_size is no single number": not isinstance(unet.get("sample_size"), int),
        "it does not map 3 channels to 3": (unet["in_channels"], unet["out_channels"]) != (3, 3),
        "it wants class labels": bool(unet.get("num_class_embeds") or unet.get("class_embed_type")),
        "it has no attention for a LoRA to adapt": not (
            unet.get("add_attention", True) or any("Attn" in block for block in blocks)
        ),
    }
    for fault, present in faults.items():
        if present:
            raise BaseModelError(f"model.path: the U-Net of {path} cannot be used: {fault}")


def check_tiny_decoder(path: str, pipeline: str) -> None:
    """Read its configuration, but no weights.

    Raises:
        BaseModelError: it is neither a folder nor a hub id of an AutoencoderTiny, or decodes other latents than the
            pipeline's.
    """
    tiny = tiny_without_weights(path).config
    _, full = _configs(pipeline)
    if full is None:
        raise BaseModelError(
            f"objective.forward_looking_decoder: {pipeline} has no decoder that a tiny one could spare"
        )
    levels = tiny.decoder_block_out_channels, full["block_out_channels"]
    channels = tiny.latent_channels, full["latent_channels"]
    shapes = [(channel, 2 ** (len(each) - 1)) for channel, each in zip(channels, levels, strict=True)]
    if shapes[0] != shapes[1]:
        raise BaseModelError(
            f"model.tiny_decoder: {path} decodes latents of {shapes[0][0]} channels to {shapes[0][1]} times their "
            f"side, {pipeline} has {shapes[1][0]} channels and {shapes[1][1]} times"
        )


def tiny_without_weights(path: str) -> AutoencoderTiny:
    """The tiny autoencoder on torch's meta device. Raises as check_tiny_decoder."""
    folder = locate(path, "config.json", "model.tiny_decoder")
    with load_errors(path, "model.tiny_decoder", "an AutoencoderTiny folder"), torch.device("meta"):
        return AutoencoderTiny.from_config(AutoencoderTiny.load_config(folder))


def without_weights(path: str) -> tuple[UNet2DConditionModel | UNet2DModel, AutoencoderKL | None]:
    """U-Net and VAE (if there is one) of a pipeline on torch's meta device, for counting. Raises as load_model."""
    unet, vae = _configs(path)
    with load_errors(path), torch.device("meta"):
        if vae is None:
            return AdaptableUNet2D.from_config(unet), None
        return UNet2DConditionModel.from_config(unet), AutoencoderKL.from_config(vae)


def _configs(path: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Of the U-Net, and of the VAE if there is one."""
    if is_unconditional(path):
        folder, subfolder = part(path, "unet")
        with load_errors(path):
            return UNet2DModel.load_config(folder, subfolder=subfolder), None
    folder = locate(path)
    with load_errors(path):
        return (
            UNet2DConditionModel.load_config(folder, subfolder="unet"),
            AutoencoderKL.load_config(folder, subfolder="vae"),
        )
