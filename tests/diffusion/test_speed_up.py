"""Layouts and compilation change last bits, not the function: with the adapter on, off, and in the backward pass."""

import pytest
import torch

from diffusion import lora
from diffusion.base_model import BaseModel


def outputs(path: str, **how: bool) -> list[torch.Tensor]:
    """Guided output, the frozen reference's and its gradient to x, and the adapter's gradient."""
    model = BaseModel(path)
    model.attach_lora(rank=2, alpha=2, seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, parameter in lora.named(model.unet):
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.speed_up(**how)
    x, t = torch.randn(2, *model.latent_shape), torch.tensor([500, 20])
    embeddings = model.embed(["a red circle", "a blue star"])
    reference = model.predict_reference(x.requires_grad_(), t, embeddings)
    (slope,) = torch.autograd.grad(reference.square().mean(), x)  # by now the adapter is on again
    guided, _ = model.predict(x, t, embeddings, 3.0)
    guided.square().mean().backward()
    gradient = torch.cat([parameter.grad.flatten() for _, parameter in lora.named(model.unet)])
    return [guided.detach(), reference.detach(), slope, gradient]


@pytest.mark.parametrize(
    "how", [{"channels_last": True}, {"checkpointing": True}, pytest.param({"compiled": True}, marks=pytest.mark.slow)]
)
def test_the_same_function(how, tiny_pipeline):
    plain = outputs(tiny_pipeline)
    assert not torch.allclose(plain[0], plain[1], atol=1e-2)  # the adapter does something
    for found, expected in zip(outputs(tiny_pipeline, **how), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
