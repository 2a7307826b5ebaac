"""An unconditional base model in pixel space: DDPM pipelines (UNet2DModel and DDPMScheduler), arXiv 2006.11239.

The papers' toy is google/ddpm-cifar10-32. No text, no VAE, no guidance: states are images in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.loaders.peft import PeftAdapterMixin
from torch import Tensor

from diffusion import lora
from diffusion.base_model import BaseModel
from diffusion.locate import BaseModelError, load_errors, part


class AdaptableUNet2D(PeftAdapterMixin, UNet2DModel):
    """diffusers' unconditional U-Net with the adapter methods that its conditional one has."""


class UnconditionalModel(BaseModel):
    """A U-Net with a LoRA on its attention; embeddings are empty, [B, 0, 0]."""

    embedding_width = None

    def __init__(self, path: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """
        Raises:
            BaseModelError: the path is no pipeline folder and the hub does not have it, or the U-Net has no attention.
        """
        (folder, unet), (_, scheduler) = part(path, "unet"), part(path, "scheduler")
        with load_errors(path):
            # Old DDPMs have a .bin alone, which diffusers reads with weights_only.
            self.unet = AdaptableUNet2D.from_pretrained(folder, subfolder=unet, dtype=dtype, use_safetensors=None)
            self.scheduler = DDIMScheduler.from_pretrained(folder, subfolder=scheduler)
        if not any(name.endswith(lora.TARGETS[0]) for name, _ in self.unet.named_modules()):
            raise BaseModelError(f"model.path: the U-Net of {path} has no attention for a LoRA to adapt")
        self.device, self.dtype = torch.device(device), dtype
        self.unet.to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Nothing: [B, 0, 0]."""
        return torch.zeros(len(prompts), 0, 0, device=self.device)

    def predict(self, x: Tensor, t: Tensor, embeddings: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
        """Model output at images x [B, C, H, W], timesteps t [B], twice: there is nothing to guide."""
        output = self.unet(x.to(self.dtype), t).sample.float()
        return output, output


class PixelDecoder:
    """States -> images for models that have no VAE."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    def __call__(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32 in [0, 1] of states [B, 3, H, W] in [-1, 1], with gradient to the states."""
        return (latents.to(self.device).float() / 2 + 0.5).clamp(0, 1)
