"""A base model tried without its weights, before a run: what its configuration says must compute."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import flux, lora, sd3, sdxl
from diffusion.base_model import decode, load_kernel
from diffusion.families import Family
from diffusion.kernels import GaussianKernel
from diffusion.locate import family_of, load_errors
from diffusion.parts import check_parts, latent_shape, text_encoders_without_weights, without_weights
from diffusion.settings import Grid, StepKernel


def check_model(
    path: str, num_steps: int, eta: float, grid: Grid = "ddim", pixels: int | None = None, kind: StepKernel = "ddim",
    spread: Sequence[float] | None = None, whole: bool = True,
) -> GaussianKernel:  # fmt: skip
    """The kernel of a model that can be trained; `whole` as check_parts says. Raises BaseModelError as check_parts and
    load_kernel, for pictures of a size that cannot be, and where a part does not compute on torch's meta device, or a
    LoRA finds no place."""
    with load_errors(path):
        check_parts(path, whole)
        kernel, shape = load_kernel(path, num_steps, eta, grid, pixels, kind, spread), latent_shape(path, pixels)
    family, (network, vae) = family_of(path), without_weights(path)
    for name, encoder in text_encoders_without_weights(path).items():
        with load_errors(path, part=f"{name}/config.json"), torch.device("meta"):
            encoder(torch.zeros(1, 2, dtype=torch.int64), output_hidden_states=True).hidden_states[-2]
    with torch.no_grad(), torch.device("meta"):
        with load_errors(path, part=f"{family.network}/config.json"):
            x, t = torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64)
            network_output(family, network, x, t, torch.zeros(1, 3, embedding_width(network) or 0), 1.0)
            lora.attach(network, 1, 1)
        if vae is not None:
            with load_errors(path, part="vae/config.json"):
                decode(vae, x)
    return kernel


def embedding_width(network: nn.Module) -> int | None:
    """E of the embeddings that it reads; None without prompts."""
    config: Any = network.config
    return getattr(config, "cross_attention_dim", None) or getattr(config, "joint_attention_dim", None)


def network_output(
    family: Family, network: Any, x: Tensor, t: Tensor, embeddings: Tensor, guidance: float
) -> Tensor:  # fmt: skip
    """[B, C, H, W], in one pass, of a network that may be on the meta device."""
    if family.name == "sd3":
        return sd3.velocity(network, x, t, embeddings)
    if family.name == "sdxl":
        return sdxl.predicted(network, x, t, embeddings, torch.zeros(6, dtype=x.dtype, device=x.device))
    if family.name == "flux":
        return flux.velocity(network, x, t, embeddings, guidance)
    return network(x, t, **({"encoder_hidden_states": embeddings} if family.text else {})).sample
