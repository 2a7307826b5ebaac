"""FLOPs of the reward models that Tributary knows, counted on networks without weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from learner.config.sections import RewardConfig


def reward_cost(reward: RewardConfig) -> float | None:
    """FLOPs of scoring one image at the published size, its prompt read anew; None for a reward that is not known.
    JPEG's are the CPU's, and none."""
    if reward.name in ("jpeg_compressibility", "jpeg_incompressibility"):
        return 0.0
    known: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor | None, ...]]]] = {
        "aesthetic": _aesthetic, "hpsv2": _hpsv2, "imagereward": _imagereward,
    }  # fmt: skip
    if reward.name not in known:
        return None
    with torch.device("meta"):
        network, arguments = known[reward.name]()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(*arguments)
    return float(counter.get_total_flops())


def _aesthetic() -> tuple[nn.Module, tuple[Tensor | None, ...]]:
    from transformers import CLIPVisionConfig

    from rewards.aesthetic import Network

    large = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
        projection_dim=768,
    )  # fmt: skip
    return Network(large), (torch.zeros(1, 3, 224, 224),)


def _hpsv2() -> tuple[nn.Module, tuple[Tensor | None, ...]]:
    from rewards.hpsv2 import Network, Size

    ids = torch.zeros(1, Size.context, dtype=torch.int64)
    return Network(Size().config()), (torch.zeros(1, 3, Size.image, Size.image), ids)


def _imagereward() -> tuple[nn.Module, tuple[Tensor | None, ...]]:
    from transformers import BlipTextConfig

    from rewards.imagereward import TOKENS, Network, Vision

    text = BlipTextConfig(
        vocab_size=30524, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        encoder_hidden_size=Vision.width, is_decoder=True,
    )  # fmt: skip
    text._attn_implementation = "eager"
    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    pixels = torch.zeros(1, 3, Vision.image, Vision.image)
    return Network(Vision().config(), text), (pixels, ids, None)  # a mask would be looked into
