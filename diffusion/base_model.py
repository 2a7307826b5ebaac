"""Base models: prompts -> embeddings, guided U-Net output, latents -> images.

diffusers, transformers and PEFT are imported inside functions: their five CPU seconds are for processes with a model.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion import lora
from diffusion.kernels import DDIMKernel
from diffusion.locate import INDEX, TINY_DECODER, BaseModelError, is_unconditional, load_errors, locate, part_config
from diffusion.settings import Grid

OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # a pipeline's parts that no run opens


class BaseModel:
    """A U-Net with one LoRA on its attention, and the frozen text encoder of its prompts. The VAE is Decoder's.

    Latents of Stable Diffusion are in the U-Net's own scale (already multiplied by the VAE's scaling_factor). DDPM
    pipelines (arXiv 2006.11239) have neither prompts, VAE nor guidance: embeddings are [B, 0, 0], states are images in
    [-1, 1]. `dtype` is the U-Net's; the adapter and the text encoder, which runs once a prompt, are float32."""

    _adapted = True

    def __init__(self, path: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Raises BaseModelError as `locate.is_unconditional`."""
        import diffusers
        import transformers

        for library in (diffusers, transformers):  # a bar for a dozen small files, in every actor, helps nobody
            library.utils.logging.disable_progress_bar()
        folder, unconditional, dtypes = locate(path), is_unconditional(path), {"unet": dtype, "default": torch.float32}
        pipeline: Any
        with load_errors(path):
            if unconditional:  # old ones have a .bin alone: read with weights_only
                pipeline = diffusers.DDPMPipeline.from_pretrained(folder, dtype=dtypes, use_safetensors=None)
            else:
                left_out = dict.fromkeys(("vae", *OPTIONAL))
                pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
                    folder, dtype=dtypes, requires_safety_checker=False, use_safetensors=True, **left_out
                )
        self.device, self.dtype = torch.device(device), dtype
        self.unet: Any = pipeline.unet.to(device).requires_grad_(False).eval()
        self.scheduler = pipeline.scheduler
        if not unconditional:
            self.text_encoder = pipeline.text_encoder.to(device).requires_grad_(False).eval()
            self.tokenizer = pipeline.tokenizer
        self._embeddings: dict[str, Tensor] = {}

    @property
    def latent_shape(self) -> tuple[int, int, int]:  # C, H, W
        return self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size

    @property
    def embedding_width(self) -> int | None:  # E; None for models without prompts
        return getattr(self.unet.config, "cross_attention_dim", None)

    def kernel(self, num_steps: int, eta: float = 1.0, grid: Grid = "ddim") -> DDIMKernel:
        return DDIMKernel.from_scheduler(self.scheduler, num_steps, eta, grid)

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

    def attach_lora(self, rank: int, alpha: float, seed: int, targets: Sequence[str] | str = lora.TARGETS) -> None:
        """As lora.attach; the same seed gives the same initial adapter on every machine."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lora.attach(self.unet, rank, alpha, targets)

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
        """Prompt embeddings [B, L, E], computed once a prompt, and one by one: they must not depend on the batch."""
        if self.embedding_width is None:
            return torch.zeros(len(prompts), 0, 0, device=self.device)
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeddings:
                ids = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
                self._embeddings[prompt] = self.text_encoder(ids.to(self.device))[0][0]
        return torch.stack([self._embeddings[prompt] for prompt in prompts])

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
        self.vae: Any = None
        if tiny or not is_unconditional(path):
            from diffusers import AutoencoderKL, AutoencoderTiny

            kind, *place = (AutoencoderTiny, *TINY_DECODER) if tiny else (AutoencoderKL, INDEX, "model.path")
            folder, options = locate(path, *place), {} if tiny else {"subfolder": "vae"}
            with load_errors(path, place[1]):
                vae = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, **options)
            self.vae = vae.to(device).requires_grad_(False).eval()

    def __call__(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32 in [0, 1] of latents [B, C, h, w], with gradient to the latents."""
        images = latents.to(self.device)
        if self.vae is not None:
            images = self.vae.decode(images.to(self.dtype) / self.vae.config.scaling_factor).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)


def load_kernel(path: str, num_steps: int, eta: float, grid: Grid = "ddim") -> DDIMKernel:
    """The kernel of a pipeline's scheduler. Raises BaseModelError as `is_unconditional`, ValueError as DDIMKernel."""
    from diffusers import DDIMScheduler

    config = part_config(path, "scheduler")
    with load_errors(path):
        scheduler = DDIMScheduler.from_config(config)
    return DDIMKernel.from_scheduler(scheduler, num_steps, eta, grid)


def check_parts(path: str) -> None:
    """Raises BaseModelError where a part has no configuration, or a U-Net without text cannot be trained here."""
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
