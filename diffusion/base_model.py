"""Base models: prompts -> embeddings, guided U-Net output, latents -> images.

diffusers, transformers and PEFT are imported inside functions: their five CPU seconds are for processes with a model.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion import gpu_memory, lora
from diffusion.flow_kernels import FlowGRPOKernel, FlowKernel
from diffusion.kernels import DDIMKernel, GaussianKernel
from diffusion.locate import (
    INDEX,
    TINY_DECODER,
    BaseModelError,
    family_of,
    is_unconditional,
    load_errors,
    locate,
    part_config,
)
from diffusion.parts import PACKED, check_weights, latent_shape, load_scheduler, reads_by_t5
from diffusion.settings import Grid, StepKernel

CHECKPOINTED = 256  # pixels a side, from which on a decoder's blocks are computed again on the way back
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # a pipeline's parts that no run opens


class BaseModel:
    """A denoising network, `unet`, with one LoRA on its attention, and the frozen text encoders of its prompts: here of
    Stable Diffusion 1.x and 2.x and of DDPM. The VAE is Decoder's.

    Latents of Stable Diffusion are in the U-Net's own scale (already multiplied by the VAE's scaling_factor). DDPM
    pipelines (arXiv 2006.11239) have neither prompts, VAE nor guidance: embeddings are [B, 0, 0], states are images in
    [-1, 1]. `dtype` is the U-Net's; the adapter and the text encoders, which run once a prompt, are float32. These are
    opened at the first prompt that nobody has embedded before."""

    _adapted = True

    _lender: "BaseModel | None" = None  # whose frozen parts this one uses
    _times: Tensor | None = None  # of a flow model: what the network is told, by the kernel's labels

    def __init__(
        self,
        path: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        pixels: int | None = None,
        text_tokens: int | None = None,
        embedded: Mapping[str, np.ndarray] | None = None,
        network: bool = True,
    ) -> None:
        """`pixels`: side of the pictures, None: the model's own; `text_tokens` that a T5 reads, None: as its pipeline
        has it; `embedded`: rows [L, E] float32 by prompt that `embed` has found before; without the `network` it can do
        nothing else. Raises BaseModelError as `locate.is_unconditional`, and for a size that cannot be."""
        import diffusers
        import transformers

        for library in (diffusers, transformers):  # a bar for a dozen small files, in every actor, helps nobody
            library.utils.logging.disable_progress_bar()
        self.path, self.scheduler = path, load_scheduler(path)
        self.device, self.dtype = torch.device(device), dtype
        self._embeddings: dict[str, Tensor] = {}
        self._embedded = embedded or {}
        self.latent_shape = latent_shape(path, pixels)  # C, H, W
        self._pixels = pixels
        self._family = family_of(path)  # once: it reads a file, and every guided step embeds the empty prompt
        self._t5_tokens, self.unet = text_tokens or self._family.t5_tokens, None
        if network:
            name = self._family.network
            self.unet = getattr(self._pipeline([name], self.dtype), name).to(device).requires_grad_(False).eval()
            check_weights(path, name, self.unet)

    unet: Any

    def _pipeline(self, parts: Sequence[str], dtype: torch.dtype = torch.float32) -> Any:
        """The pipeline, opened with these of its parts."""
        import diffusers

        family = self._family
        kind: Any = getattr(diffusers, family.pipelines[0])
        with load_errors(self.path):
            if not family.text:  # old ones have a .bin alone: read with weights_only
                return kind.from_pretrained(
                    locate(self.path), dtype=dtype, use_safetensors=None, scheduler=self.scheduler
                )
            closed: dict[str, Any] = dict.fromkeys(name for name in family.all_parts if name not in parts)
            closed |= {"scheduler": self.scheduler}  # the folder's own is not opened again
            plain = family.name == "base_model"  # others know no safety checker
            closed |= dict.fromkeys(OPTIONAL if plain else OPTIONAL[1:])
            more = {"requires_safety_checker": False} if plain else {}
            return kind.from_pretrained(locate(self.path), dtype=dtype, use_safetensors=True, **closed, **more)

    @cached_property
    def texts(self) -> Any:
        """The pipeline with its text encoders and tokenizers alone."""
        there = self._family.all_parts if reads_by_t5(self.path) else self._family.parts
        names = [name for name in there if name.startswith(("text_encoder", "tokenizer"))]
        pipeline = self._pipeline(names)
        for name in names:
            if name.startswith("text_encoder") and (encoder := getattr(pipeline, name)) is not None:
                check_weights(self.path, name, encoder)
                encoder.to(self.device).requires_grad_(False).eval()
        return pipeline

    @property
    def embedding_width(self) -> int | None:  # E; None for models without prompts
        return getattr(self.unet.config, "cross_attention_dim", None)

    def kernel(
        self, num_steps: int, eta: float = 1.0, grid: Grid = "ddim", kind: StepKernel = "ddim",
        spread: Sequence[float] | None = None,
    ) -> GaussianKernel:  # fmt: skip
        """Of a flow model, its labels are what `predict` takes for t from then on. `spread` [N] is what a calibrated
        one goes by; without it has the posterior's variance alone."""
        kernel = _kernel(self.path, self.scheduler, num_steps, eta, grid, self._pixels, kind, spread)
        if isinstance(kernel, FlowKernel):
            self._times = torch.cat([torch.zeros(1), kernel.times.flip(0)]).to(self.device)
        return kernel

    def speed_up(self, channels_last: bool = False, compiled: bool = False, checkpointing: bool = False) -> None:
        """The same function in other last bits, with activations computed again in the backward pass in the same."""
        if channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if checkpointing:
            self.unet.enable_gradient_checkpointing(self._checkpoint)
        if compiled:
            # All blocks share one forward; adapter on and off, with and without gradient, and each width are graphs.
            torch._dynamo.config.recompile_limit = 64
            self.unet.compile_repeated_blocks() if self.unet._repeated_blocks else self.unet.compile()

    def attach_lora(
        self, rank: int, alpha: float, seed: int, targets: Sequence[str] | str = lora.TARGETS["attention"]
    ) -> None:
        """As lora.attach; the same seed gives the same initial adapter on every machine."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lora.attach(self.unet, rank, alpha, targets)

    def borrow(self, lender: "BaseModel") -> None:
        """Use the frozen network and the text encoders of another model of the same pipeline, in the same process, in
        place of its own, which go; the adapter stays its own."""
        frozen = dict(lender.unet.named_parameters())
        for name, parameter in self.unet.named_parameters():
            if not parameter.requires_grad:
                parameter.data = frozen[name].data
        self._lender = lender

    @contextlib.contextmanager
    def without_lora(self) -> Iterator[None]:
        """The frozen reference: the same module with its adapter switched off."""
        before, self._adapted = self._adapted, False
        lora.switch(self.unet, False)
        try:
            yield
        finally:
            self._adapted = before
            lora.switch(self.unet, before)

    def _checkpoint(self, block: nn.Module, *arguments: Any) -> Any:
        """A block's activations are computed again when the adapter is on: it must be as it was."""
        function = block.__call__ if self._adapted else self.without_lora()(block.__call__)
        return checkpoint(function, *arguments, use_reentrant=False)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompt embeddings [B, L, E], computed once a prompt, and one by one: they must not depend on the batch. What
        is in which row is the model's own affair."""
        if not self._family.text:
            return torch.zeros(len(prompts), 0, 0, device=self.device)
        rows = {prompt: self._rows(prompt) for prompt in dict.fromkeys(prompts)}
        return torch.stack([rows[prompt] for prompt in prompts])

    def _rows(self, prompt: str) -> Tensor:
        """[L, E]. Those that were embedded before stay in the host's memory, but for the empty prompt's, which every
        guided step reads: a long list's are more than a GPU holds."""
        if self._lender is not None:
            return self._lender._rows(prompt)
        if prompt not in self._embeddings:
            given = self._embedded.get(prompt)
            rows = self._encode(prompt) if given is None else gpu_memory.to_device(given, self.device)
            if given is not None and prompt:
                return rows
            self._embeddings[prompt] = rows
        return self._embeddings[prompt]

    def _encode(self, prompt: str) -> Tensor:
        """[L, E]."""
        ids = self.texts.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.texts.text_encoder(ids.to(self.device))[0][0]

    def predict(self, x: Tensor, t: Tensor, embeddings: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
        """Model output at latents x [B, C, H, W], timesteps t [B]: (guided, conditional), float32; with guidance 1 both
        are the conditional one."""
        if guidance == 1.0:
            conditional = self._output(x, t, embeddings)
            return conditional, conditional
        empty = self.embed([""]).expand(len(x), -1, -1)
        both = self._output(torch.cat([x, x]), torch.cat([t, t]), torch.cat([empty, embeddings]))
        unconditional, conditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional), conditional

    def _output(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        text = {} if self.embedding_width is None else {"encoder_hidden_states": embeddings.to(self.dtype)}
        return self.unet(x.to(self.dtype), t, **text).sample.float()

    def predict_reference(self, x: Tensor, t: Tensor, embeddings: Tensor, guidance: float = 1.0) -> Tensor:
        """Guided output of the frozen reference (adapter off), with gradient to x alone."""
        with self.without_lora():
            return self.predict(x, t, embeddings, guidance)[0]


class Decoder:
    """Latents -> images: the base model's VAE alone (a model without one has images already), or an AutoencoderTiny."""

    def __init__(self, path: str, device: str = "cpu", dtype: torch.dtype = torch.float32, tiny: bool = False) -> None:
        """`path` is a pipeline's, with `tiny` that of the autoencoder itself. Raises as BaseModel."""
        self.device, self.dtype = torch.device(device), dtype
        self.magnification = 1  # pixels a side for each of the latents'
        self.vae: Any = None
        if tiny or not is_unconditional(path):
            from diffusers import AutoencoderKL, AutoencoderTiny

            kind, *place = (AutoencoderTiny, *TINY_DECODER) if tiny else (AutoencoderKL, INDEX, "model.path")
            folder, options = locate(path, *place), {} if tiny else {"subfolder": "vae"}
            with load_errors(path, place[1]):
                vae = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options)
            if not tiny:
                check_weights(path, "vae", vae)
            self.vae = vae.to(device).requires_grad_(False).eval()
            self.magnification = 2 ** (
                len(vae.config["decoder_block_out_channels" if tiny else "block_out_channels"]) - 1
            )

    def __call__(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32 in [0, 1] of latents [B, C, h, w], with gradient to the latents."""
        images = latents.to(self.device)
        if self.vae is not None:
            spare_memory(self.vae, latents.shape[-1] * self.magnification)
            images = decode(self.vae, images.to(self.dtype))
        return (images.float() / 2 + 0.5).clamp(0, 1)


def spare_memory(vae: Any, pixels: int) -> None:
    """Of pictures of this side, and on the way back alone: Stable Diffusion's decoder would keep 6 GB of one of 512."""
    if pixels >= CHECKPOINTED and vae._supports_gradient_checkpointing:
        vae.enable_gradient_checkpointing()


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W] around [-1, 1] of a denoiser's latents."""
    latents = latents / vae.config.scaling_factor
    if vae.config.get("shift_factor"):  # of Stable Diffusion 3
        latents = latents + vae.config.shift_factor
    return vae.decode(latents).sample


def load_kernel(
    path: str, num_steps: int, eta: float, grid: Grid = "ddim", pixels: int | None = None, kind: StepKernel = "ddim",
    spread: Sequence[float] | None = None,
) -> GaussianKernel:  # fmt: skip
    """The kernel of a pipeline's scheduler. Raises BaseModelError as `load_scheduler`, or for settings of the scheduler
    that the kernel does not follow."""
    return _kernel(path, load_scheduler(path), num_steps, eta, grid, pixels, kind, spread)


def _kernel(
    path: str, scheduler: Any, num_steps: int, eta: float, grid: Grid, pixels: int | None, kind: StepKernel,
    spread: Sequence[float] | None,
) -> GaussianKernel:  # fmt: skip
    try:
        if (family := family_of(path)).flow:
            if grid != "ddim":
                raise ValueError(f"sampler.grid: {grid} is a diffusion model's; set it to ddim")
            patch, sigmas = part_config(path, family.network).get("patch_size", 2), None
            if family.name == "flux":  # its pipeline packs latents itself, and hands its scheduler these
                patch, sigmas = PACKED, np.linspace(1.0, 1 / num_steps, num_steps)
            tokens = (latent_shape(path, pixels)[1] // patch) ** 2
            kernel = FlowKernel.from_scheduler(scheduler, num_steps, eta, sigmas, tokens)
            if kind == "flow_grpo":
                return FlowGRPOKernel(kernel.sigmas, kernel.times, a=eta)
            return kernel.calibrated(torch.tensor(spread)) if kind == "calibrated" and spread else kernel
        if kind != "ddim":
            raise ValueError(f"sampler.kernel: {kind} is a flow model's; set it to ddim")
        return DDIMKernel.from_scheduler(scheduler, num_steps, eta, grid)
    except BaseModelError:  # of another part, or model.pixels
        raise
    except (ValueError, TypeError) as error:
        raise BaseModelError(f"model.path: the scheduler of {path} cannot be used: {error}") from error
