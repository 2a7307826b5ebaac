"""Opens what `model.path` names, whichever kind of pipeline it is: the model, the decoder, or only their shapes."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from transformers import AutoConfig

from diffusion.base_model import BaseModel, Decoder
from diffusion.kernels import DDIMKernel, Grid
from diffusion.locate import is_unconditional, load_errors, locate, part
from diffusion.unconditional import AdaptableUNet2D, PixelDecoder, UnconditionalModel


def load_model(path: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> BaseModel:
    """The U-Net, and what turns prompts into its embeddings.

    Raises:
        BaseModelError: the path is no pipeline folder and the hub does not have it (or cannot be reached).
    """
    return (UnconditionalModel if is_unconditional(path) else BaseModel)(path, device, dtype)


def load_decoder(path: str, device: str = "cpu") -> Decoder | PixelDecoder:
    """What turns states into images.

    Raises:
        BaseModelError: as load_model.
    """
    return PixelDecoder() if is_unconditional(path) else Decoder(path, device)


def load_kernel(path: str, num_steps: int, eta: float, grid: Grid = "ddim") -> DDIMKernel:
    """The kernel of a pipeline's scheduler, without loading any weights.

    Raises:
        BaseModelError: as load_model.
        ValueError: as DDIMKernel.
    """
    folder, subfolder = part(path, "scheduler") if is_unconditional(path) else (locate(path), "scheduler")
    with load_errors(path):
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder=subfolder)
    return DDIMKernel.from_scheduler(scheduler, num_steps, eta, grid)


def check_parts(path: str) -> None:
    """Read the configurations of U-Net, VAE and text encoder, but no weights.

    Raises:
        BaseModelError: as load_model.
    """
    if is_unconditional(path):
        folder, subfolder = part(path, "unet")
        with load_errors(path):
            UNet2DModel.load_config(folder, subfolder=subfolder)
        return
    folder = locate(path)
    with load_errors(path):
        UNet2DConditionModel.load_config(folder, subfolder="unet")
        AutoencoderKL.load_config(folder, subfolder="vae")
        AutoConfig.from_pretrained(folder, subfolder="text_encoder")


def without_weights(path: str) -> tuple[UNet2DConditionModel | UNet2DModel, AutoencoderKL | None]:
    """U-Net and VAE (if there is one) of a pipeline on torch's meta device: shapes only, for counting what they would
    cost.

    Raises:
        BaseModelError: as load_model.
    """
    if is_unconditional(path):
        folder, subfolder = part(path, "unet")
        with load_errors(path), torch.device("meta"):
            return AdaptableUNet2D.from_config(UNet2DModel.load_config(folder, subfolder=subfolder)), None
    folder = locate(path)
    with load_errors(path), torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))
    return unet, vae
