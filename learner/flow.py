"""The flow networks: log-flow f_phi(x_t, t, c) as a scalar, and its gradient h_phi(x_t, t, c) as a field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D
from torch import Tensor, nn


def _zero(layer: Any) -> Any:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class FlowNetwork(nn.Module):
    """Learned part of the state log-flow, [B] nats, for latents [B, C, H, W], timesteps [B], embeddings [B, L, E]: the
    down path of a small U-Net, pooled to a scalar.

    One ResNet layer a block, cross-attention on the (conditional) prompt embedding, if there is one, in all blocks but
    the last; every block halves the image while it can. The output layer starts at zero, so log F starts at psi.
    """

    def __init__(
        self,
        in_channels: int,
        cross_attention_dim: int | None,
        widths: Sequence[int] = (64, 128, 256, 256),
        stem_stride: int = 1,
        head_dim: int = 8,
    ) -> None:
        """`stem_stride` 2 halves the image before the first block: four times cheaper on small models."""
        super().__init__()
        time_width = 4 * widths[0]
        self.time = nn.Sequential(Timesteps(widths[0], True, 0), TimestepEmbedding(widths[0], time_width))
        self.enter = nn.Conv2d(in_channels, widths[0], 3, stride=stem_stride, padding=1)
        blocks, width = [], widths[0]
        for i, wider in enumerate(widths):
            groups = min(32, width // 4, wider // 4)
            if cross_attention_dim and (i < len(widths) - 1 or len(widths) == 1):
                block: nn.Module = CrossAttnDownBlock2D(
                    width, wider, time_width, num_layers=1, num_attention_heads=wider // head_dim,
                    cross_attention_dim=cross_attention_dim, resnet_groups=groups, add_downsample=True,
                )  # fmt: skip
            else:
                block = DownBlock2D(width, wider, time_width, num_layers=1, resnet_groups=groups, add_downsample=True)
            blocks.append(block)
            width = wider
        self.blocks = nn.ModuleList(blocks)
        self.leave = _zero(nn.Linear(width, 1))

    def forward(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        time = self.time(t)
        hidden = self.enter(x.float())
        for block in self.blocks:
            conditional = isinstance(block, CrossAttnDownBlock2D)
            hidden, _ = block(hidden, time, **({"encoder_hidden_states": embeddings.float()} if conditional else {}))
        return self.leave(hidden.mean((2, 3))).squeeze(1)


class GradientNetwork(nn.Module):
    """Learned part of grad_x log F(x_t), [B, C, H, W], nabla-DB's flow network: a small U-Net of one layer a block.

    The output layer starts at zero, so the field starts at its forward-looking part. (The published code zeroes only
    that layer's bias.)
    """

    def __init__(
        self, latent_shape: tuple[int, int, int], cross_attention_dim: int | None, widths: Sequence[int]
    ) -> None:
        super().__init__()
        channels, _, size = latent_shape
        last = len(widths) - 1
        common = {
            "sample_size": size, "in_channels": channels, "out_channels": channels, "layers_per_block": 1,
            "block_out_channels": tuple(widths), "norm_num_groups": min(32, widths[0] // 4),
        }  # fmt: skip
        self.conditional = cross_attention_dim is not None
        if self.conditional:
            self.unet = UNet2DConditionModel(
                **common, cross_attention_dim=cross_attention_dim, attention_head_dim=max(1, widths[0] // 8),
                down_block_types=tuple("DownBlock2D" if i == last else "CrossAttnDownBlock2D" for i in range(last + 1)),
                up_block_types=tuple("UpBlock2D" if i == 0 else "CrossAttnUpBlock2D" for i in range(last + 1)),
            )  # fmt: skip
        else:
            self.unet = UNet2DModel(
                **common, down_block_types=("DownBlock2D",) * (last + 1), up_block_types=("UpBlock2D",) * (last + 1),
                attention_head_dim=max(1, widths[0] // 4),
            )  # fmt: skip
        _zero(self.unet.conv_out)

    def forward(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        prompt = {"encoder_hidden_states": embeddings.float()} if self.conditional else {}
        return self.unet(x.float(), t, **prompt).sample
