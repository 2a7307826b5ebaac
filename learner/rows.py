"""Gradients of log p_F to the adapter, one a transition, in one backward pass: rows of a least-squares problem.

Of a LoRA's two matrices the second (B) alone is trained here: the adapter's outputs are then linear in the parameters.
B's gradient of one sample is the sum over its tokens (or pixels) of the gradient at its output times its input."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffusion import lora


def trained(unet: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The B matrices, sorted by name."""
    return [(name, parameter) for name, parameter in lora.named(unet) if "lora_B" in name]


class Rows:
    """Hooks on a U-Net's LoRA; remembers what went in and out of each B while it is entered."""

    def __init__(self, unet: nn.Module) -> None:
        modules = dict(unet.named_modules())
        self.modules = [modules[name.removesuffix(".weight")] for name, _ in trained(unet)]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            self.inputs[module], self.outputs[module] = inputs[0].detach(), output

        handles = [module.register_forward_hook(keep) for module in self.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of(self, values: Tensor) -> list[Tensor]:
        """Gradients [b, P_l] of each of `values` [b] to each B, in `trained`'s order; the passes that made the values
        ran while `watched`, with the b samples or, for guidance, twice as many."""
        outputs = [self.outputs[module] for module in self.modules]
        gradients = torch.autograd.grad(values.sum(), outputs)
        rows = []
        for module, gradient in zip(self.modules, gradients, strict=True):
            channels_last = [_tokens(part, isinstance(module, nn.Conv2d)) for part in (gradient, self.inputs[module])]
            each = torch.einsum("nto,nti->noi", *channels_last).flatten(1)
            rows.append(each.reshape(-1, len(values), each.shape[1]).sum(0))
        return rows


def _tokens(x: Tensor, image: bool) -> Tensor:
    """[n, tokens, channels] float32."""
    return (x.flatten(2).transpose(1, 2) if image else x.reshape(len(x), -1, x.shape[-1])).float()
