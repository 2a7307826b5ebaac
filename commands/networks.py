"""The networks of a run without their weights, on torch's meta device, and one sample through each: for counting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion import lora
from diffusion.base_model import spare_memory
from diffusion.locate import family_of
from diffusion.parts import (
    latent_shape,
    magnification,
    text_encoders_without_weights,
    tiny_without_weights,
    without_weights,
)
from diffusion.rehearsal import embedding_width, network_output
from learner.build import flow_network
from learner.config import Config, resolve

TOKENS = 77  # of a prompt's embedding: CLIP's


@dataclass(frozen=True)
class Networks:
    """As a learner rank and a reward actor have them: the network with its LoRA, in model.dtype; the decoders in that
    which they decode in."""

    unet: Any
    flow: nn.Module | None
    vae: Any  # None: states are images
    tiny: Any  # decoder; None: not in use
    encoders: dict[str, Any]  # of text, float32
    output: Callable[[], Tensor]  # of the denoising network
    log_flow: Callable[[], Tensor]  # of the flow network for one state
    latents: Tensor  # [1, C, H, W], of the decoders' type
    embedding: tuple[int, int]  # rows and width of a prompt's; 0 without text


def networks(config: Config, rows: int = 1, device: str = "meta") -> Networks:
    """`output` is of `rows` samples at once. On another device than meta, where there are no text encoders, weights are
    drawn at random. Raises a BaseModelError if the model's configuration cannot be read."""
    path, dtype = str(resolve(config.model.path)), getattr(torch, config.model.dtype)
    unet, vae = without_weights(path)
    shape = (rows, *latent_shape(path, config.model.pixels))
    width, kind, tiny = embedding_width(unet), family_of(path), None
    # Of CLIP (FLUX: none), of T5, and the pooled one, which Stable Diffusion 1.x and 2.x have not.
    t5 = kind.t5_tokens and (config.model.text_tokens or kind.t5_tokens)
    tokens = TOKENS * (kind.name != "flux") + t5 + (kind.name != "base_model")
    decoded = torch.float32 if config.needs.reward_gradients else dtype
    nn.Module.to(unet, dtype).eval()  # the class's own warns of parts in float32, also where there are none
    with torch.device("meta"):
        lora.attach(unet, config.lora.rank, config.lora.alpha or config.lora.rank, lora.TARGETS[config.lora.targets])
        flow = flow_network(config, shape[1:], width)
        if config.objective.forward_looking_decoder == "tiny":
            tiny = tiny_without_weights(str(resolve(config.model.tiny_decoder)))
    if config.learner.gradient_checkpointing:
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    for decoder in (vae, tiny):
        if decoder is not None:
            nn.Module.to(decoder, decoded).requires_grad_(False)
            spare_memory(decoder, magnification(path) * shape[-1])

    if device != "meta":
        for network in (unet, flow, vae, tiny):
            _draw(network, device)
    with torch.device(device):
        x, t = torch.zeros(shape, dtype=dtype), torch.ones(rows, dtype=torch.int64)
        embedding = torch.zeros(rows, tokens, width or 0, dtype=dtype)
        latents = torch.zeros((1, *shape[1:]), dtype=decoded, requires_grad=config.needs.reward_gradients)

    def output() -> Tensor:
        return network_output(kind, unet, x, t, embedding, config.sampler.guidance)

    def log_flow() -> Tensor:
        assert flow is not None
        return flow(x, t, embedding)

    encoders = text_encoders_without_weights(path) if kind.text and device == "meta" else {}
    return Networks(unet, flow, vae, tiny, encoders, output, log_flow, latents, (tokens, width or 0))


def _draw(network: nn.Module | None, device: str) -> None:
    """Small numbers: of a size at which nothing overflows, or is so small that a CPU is slow with it."""
    if network is not None:
        network.to_empty(device=device)
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.data.normal_(std=0.02)
            else:
                tensor.data.zero_()


def passes_of(config: Config) -> int:
    """Samples that go through the denoising network for one: two under classifier-free guidance."""
    told = family_of(str(resolve(config.model.path))).distilled
    return 1 if told or config.sampler.guidance == 1 else 2
