"""A Stable-Diffusion-shaped base model: prompts -> embeddings, guided U-Net output, latents -> images."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging as transformers_logging

from diffusion import lora
from diffusion.kernels import DDIMKernel
from diffusion.locate import load_errors, locate
from diffusion.settings import Grid

COMPILED_GRAPHS = 64

# Loading bars of a dozen small files, in every actor, help nobody.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()


class BaseModel:
    """Frozen text encoder, a U-Net with one LoRA adapter on its attention. The VAE is Decoder's.

    Latents are in the U-Net's own scale (already multiplied by the VAE's scaling_factor). `dtype` is the U-Net's; the
    adapter's parameters and the text encoder, which runs once a prompt, are float32. Attention is torch's
    scaled_dot_product_attention, diffusers' default.
    """

    _adapted = True

    def __init__(self, path: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """
        Raises:
            BaseModelError: the path is no pipeline folder and the hub does not have it (or cannot be reached).
        """
        folder = locate(path)
        with load_errors(path):
            pipeline = StableDiffusionPipeline.from_pretrained(
                folder, dtype={"unet": dtype, "default": torch.float32}, vae=None, safety_checker=None,
                feature_extractor=None, requires_safety_checker=False, use_safetensors=True,
            )  # fmt: skip
        self.device, self.dtype = torch.device(device), dtype
        self.unet: Any = pipeline.unet.to(device).requires_grad_(False).eval()
        self.text_encoder = pipeline.text_encoder.to(device).requires_grad_(False).eval()
        self.tokenizer = pipeline.tokenizer
        self.scheduler = pipeline.scheduler
        self._embeddings: dict[str, Tensor] = {}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        config = self.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def embedding_width(self) -> int | None:
        """E of a prompt's embedding; None for models without prompts."""
        return int(self.unet.config.cross_attention_dim)

    def kernel(self, num_steps: int, eta: float = 1.0, grid: Grid = "ddim") -> DDIMKernel:
        return DDIMKernel.from_scheduler(self.scheduler, num_steps, eta, grid)

    def speed_up(self, channels_last: bool = False, compiled: bool = False, checkpointing: bool = False) -> None:
        """Memory layout of the convolutions, torch.compile of the U-Net's blocks, activations computed again in the
        backward pass instead of kept: the same function, in other last bits (checkpointing: in the same)."""
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if checkpointing:
            self.unet.enable_gradient_checkpointing(self._checkpoint)
        if compiled:
            # All blocks share one forward; adapter on and off, with and without gradient, and each width are graphs.
            torch._dynamo.config.recompile_limit = COMPILED_GRAPHS
            self.unet.compile_repeated_blocks() if self.unet._repeated_blocks else self.unet.compile()

    def attach_lora(
        self, rank: int, alpha: float, seed: int, targets: Sequence[str] | str = lora.TARGETS
    ) -> list[nn.Parameter]:
        """Add the adapter; the same seed gives the same initial adapter on every machine. `targets` as lora.attach."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return lora.attach(self.unet, rank, alpha, targets)

    def without_lora(self) -> _WithoutLora:
        """The frozen reference: the same module with its adapter switched off."""
        return _WithoutLora(self)

    def _switch_lora(self, on: bool) -> None:
        (self.unet.enable_adapters if on else self.unet.disable_adapters)()
        self._adapted = on

    def _checkpoint(self, block: nn.Module, *arguments: Any) -> Any:
        """A block whose activations the backward pass computes again, by then with the adapter switched on: it must be
        as it was."""
        again = contextlib.nullcontext() if self._adapted else self.without_lora()
        return checkpoint(
            block.__call__, *arguments, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again)
        )

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings [B, L, E], computed once a prompt (one by one: a prompt's embedding must not
        depend on which others it was batched with)."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeddings:
                ids = self.tokenizer(
                    prompt, padding="max_length", max_length=self.tokenizer.model_max_length,
                    truncation=True, return_tensors="pt",
                ).input_ids  # fmt: skip
                self._embeddings[prompt] = self.text_encoder(ids.to(self.device))[0][0]
        return torch.stack([self._embeddings[prompt] for prompt in prompts])

    def predict(self, x: Tensor, t: Tensor, embeddings: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
        """Model output at latents x [B, C, H, W], timesteps t [B]: (guided, conditional), float32.

        guided = out(x, t, "") + guidance * (out(x, t, c) - out(x, t, "")); with guidance 1 both are the
        conditional output and the unconditional pass is skipped.
        """
        if guidance == 1.0:
            states = embeddings.to(self.dtype)
            conditional = self.unet(x.to(self.dtype), t, encoder_hidden_states=states).sample.float()
            return conditional, conditional
        empty = self.embed([""]).expand(len(x), -1, -1)
        both = self.unet(
            torch.cat([x, x]).to(self.dtype),
            torch.cat([t, t]),
            encoder_hidden_states=torch.cat([empty, embeddings]).to(self.dtype),
        ).sample.float()
        unconditional, conditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional), conditional

    def predict_reference(self, x: Tensor, t: Tensor, embeddings: Tensor, guidance: float = 1.0) -> Tensor:
        """Output of the frozen reference (adapter off), with gradient to x alone; without guidance the conditional
        one."""
        with self.without_lora():
            return self.predict(x, t, embeddings, guidance)[0]


class _WithoutLora:
    """To be entered again and again, as a graph that is kept for two backward passes does."""

    def __init__(self, model: BaseModel) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model._switch_lora(False)

    def __exit__(self, *error: object) -> None:
        self.model._switch_lora(True)


class Decoder:
    """Latents -> images: the base model's VAE alone, for reward actors; or a tiny autoencoder's decoder in its place
    (AutoencoderTiny, such as madebyollin/taesd for Stable Diffusion 1.5's latents)."""

    def __init__(
        self, path: str, device: str = "cpu", dtype: torch.dtype = torch.float32, tiny: bool = False
    ) -> None:  # fmt: skip
        """`path` is a pipeline's, with `tiny` that of the autoencoder itself.

        Raises:
            BaseModelError: as BaseModel.
        """
        if tiny:
            folder = locate(path, "config.json", "model.tiny_decoder")
            with load_errors(path, "model.tiny_decoder", "an AutoencoderTiny folder"):
                vae: Any = AutoencoderTiny.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        else:
            folder = locate(path)
            with load_errors(path):
                vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=dtype, use_safetensors=True)
        self.vae = vae.to(device).requires_grad_(False).eval()

    def __call__(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32 in [0, 1] of latents [B, C, h, w], with gradient to the latents."""
        scaled = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        return (self.vae.decode(scaled).sample.float() / 2 + 0.5).clamp(0, 1)
