"""Opens a base model by its family. Each is imported only if it is the one."""

from importlib import import_module

import torch

from diffusion.base_model import BaseModel
from diffusion.locate import family_of

CLASSES = {"base_model": "BaseModel", "sdxl": "StableDiffusionXL", "sd3": "StableDiffusion3", "flux": "Flux"}


def open_base_model(
    path: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    pixels: int | None = None,
    text_tokens: int | None = None,
) -> BaseModel:
    """The base model of a pipeline, as BaseModel. Raises BaseModelError as `locate.is_unconditional`, and for a size
    that cannot be."""
    name = family_of(path).name
    model: BaseModel = getattr(import_module(f"diffusion.{name}"), CLASSES[name])(
        path, device, dtype, pixels, text_tokens
    )  # fmt: skip
    return model
