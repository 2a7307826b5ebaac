"""What policy-gradient objectives share: leave-one-out advantages and the clipped loss."""

from __future__ import annotations

import torch
from torch import Tensor

ADVANTAGE_LIMIT = 5.0


def leave_one_out(raw: Tensor, group_size: int) -> Tensor:
    """Advantages [b]: raw [b] standardised within each run of `group_size`, an entry against the others: b_i = mean of
    the others; d_i = A_i - b_i; v_i = mean of the others' d_j^2; d_i / (sqrt(v_i) + 1e-8), clipped to +-5."""
    if group_size < 2 or len(raw) % group_size:
        raise ValueError(f"{len(raw)} transitions do not make leave-one-out groups of {group_size}")
    grouped = raw.reshape(-1, group_size)
    others = group_size - 1
    deviation = grouped - (grouped.sum(1, keepdim=True) - grouped) / others
    squared = deviation.square()
    variance = (squared.sum(1, keepdim=True) - squared) / others
    # A sum minus one of its terms can come out below zero by rounding.
    advantage = deviation / (variance.clamp(min=0).sqrt() + 1e-8)
    return advantage.clamp(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT).reshape(-1)


def clipped(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Clipped policy-gradient loss [b] (its gradient is zero where the clip binds), and whether the ratio
    exp(log_ratio) is outside of 1 +- clip_range [b] bool. `advantage` must carry no gradient."""
    ratio = log_ratio.clamp(max=20.0).exp()  # nats, beyond any clip; exp would overflow to a gradient of 0 x inf
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * bounded), (ratio.detach() - 1).abs() > clip_range
