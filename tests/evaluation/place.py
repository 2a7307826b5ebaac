"""A user's own reward: how far to the right a dark or coloured thing is on a white background, in 5 pixels."""

import torch


def horizontal(images: torch.Tensor, prompts) -> torch.Tensor:
    """[B] of images [B, 3, H, W]: its centroid from the middle; 0 where there is nothing."""
    weight = (1 - images.amin(1) - 0.25).clamp(min=0)  # of what is not white
    places = torch.arange(images.shape[-1], device=images.device) - (images.shape[-1] - 1) / 2
    return (weight.sum(1) * places).sum(1) / weight.sum((1, 2)).clamp(min=1e-3) / 5
