"""The flow networks: log-flow f_phi(x_t, t, c) as a scalar, and its gradient h_phi(x_t, t, c) as a field. Both output
layers start at zero, so that a state's flow starts at its forward-looking part. (Published code zeroes only the bias.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D
from torch import Tensor, nn

HEAD = 8  # channels of an attention head


def _zero(layer: Any) -> Any:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class FlowNetwork(nn.Module):
    """Learned part of the state log-flow, [B] nats, for latents [B, C, H, W], timesteps [B], embeddings [B, L, E]: the
    down path of a small U-Net, pooled to a scalar. One ResNet layer a block, cross-attention on the (conditional)
    prompt embedding, if there is one, in all blocks but the last; every block halves the image while it can."""

    def __init__(
        self, in_channels: int, cross_attention_dim: int | None, widths: Sequence[int], stem_stride: int = 1
    ) -> None:
        """`stem_stride` 2 halves the image before the first block: four times cheaper on small models."""
        super().__init__()
        time_width, width = 4 * widths[0], widths[0]
        self.time = nn.Sequential(Timesteps(width, True, 0), TimestepEmbedding(width, time_width))
        self.enter = nn.Conv2d(in_channels, width, 3, stride=stem_stride, padding=1)
        self.blocks = nn.ModuleList()
        for i, wider in enumerate(widths):
            options: dict[str, Any] = {"num_layers": 1, "resnet_groups": min(32, width // 4, wider // 4)}
            if cross_attention_dim and (i < len(widths) - 1 or len(widths) == 1):
                options |= {"num_attention_heads": wider // HEAD, "cross_attention_dim": cross_attention_dim}
                self.blocks.append(CrossAttnDownBlock2D(width, wider, time_width, **options))
            else:
                self.blocks.append(DownBlock2D(width, wider, time_width, **options))
            width = wider
        self.leave = _zero(nn.Linear(width, 1))

    def forward(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        time, hidden = self.time(t), self.enter(x.float())
        for block in self.blocks:
            conditional = isinstance(block, CrossAttnDownBlock2D)
            hidden, _ = block(hidden, time, **({"encoder_hidden_states": embeddings.float()} if conditional else {}))
        return self.leave(hidden.mean((2, 3))).squeeze(1)


class GradientNetwork(nn.Module):
    """Learned part of grad_x log F(x_t), [B, C, H, W], nabla-DB's flow network: a small U-Net of one layer a block,
    with cross-attention in all blocks but the deepest."""

    def __init__(
        self, latent_shape: tuple[int, int, int], cross_attention_dim: int | None, widths: Sequence[int]
    ) -> None:
        super().__init__()
        channels, _, size = latent_shape
        self.conditional, inner = cross_attention_dim is not None, len(widths) - 1
        options: dict[str, Any] = {
            "sample_size": size, "in_channels": channels, "out_channels": channels, "layers_per_block": 1,
            "block_out_channels": tuple(widths), "norm_num_groups": min(32, widths[0] // 4),
        }  # fmt: skip
        if self.conditional:
            down = ("CrossAttnDownBlock2D",) * inner + ("DownBlock2D",)
            up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * inner
            options |= {"cross_attention_dim": cross_attention_dim, "attention_head_dim": max(1, widths[0] // 8)}
            self.unet = UNet2DConditionModel(down_block_types=down, up_block_types=up, **options)
        else:
            down, up = ("DownBlock2D",) * (inner + 1), ("UpBlock2D",) * (inner + 1)
            options["attention_head_dim"] = max(1, widths[0] // 4)
            self.unet = UNet2DModel(down_block_types=down, up_block_types=up, **options)
        _zero(self.unet.conv_out)

    def forward(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        prompt = {"encoder_hidden_states": embeddings.float()} if self.conditional else {}
        return self.unet(x.float(), t, **prompt).sample
