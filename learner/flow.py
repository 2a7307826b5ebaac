"""The flow networks: log-flow f_phi(x_t, t, c) as a scalar, and its gradient h_phi(x_t, t, c) as a field. Both output
layers start at zero, so that a state's flow starts at its forward-looking part. (Published code zeroes only the bias.)
"""

from collections.abc import Sequence
from typing import Any

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, DownBlock2D
from torch import Tensor, nn

HEAD = 8  # channels of an attention head


class FlowNetwork(nn.Module):
    """Learned part of the state log-flow, [B] nats, for latents [B, C, H, W], timesteps [B], embeddings [B, L, E]: the
    down path of a small U-Net, pooled to a scalar. One ResNet layer a block, cross-attention on the (conditional)
    prompt embedding, if there is one, in all blocks but the last; every block halves the image while it can."""

    def __init__(self, channels: int, cross_attention_dim: int | None, widths: Sequence[int], stem_stride: int) -> None:
        super().__init__()
        time_width, width = 4 * widths[0], widths[0]
        self.time = nn.Sequential(Timesteps(width, True, 0), TimestepEmbedding(width, time_width))
        self.enter = nn.Conv2d(channels, width, 3, stride=stem_stride, padding=1)
        self.blocks = nn.ModuleList()
        for i, wider in enumerate(widths):
            options: dict[str, Any] = {"num_layers": 1, "resnet_groups": min(32, width // 4, wider // 4)}
            if cross_attention_dim and (i < len(widths) - 1 or len(widths) == 1):
                options |= {"num_attention_heads": wider // HEAD, "cross_attention_dim": cross_attention_dim}
                self.blocks.append(CrossAttnDownBlock2D(width, wider, time_width, **options))
            else:
                self.blocks.append(DownBlock2D(width, wider, time_width, **options))
            width = wider
        self.leave = nn.Linear(width, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        time, hidden = self.time(t), self.enter(x.float())
        for block in self.blocks:
            prompt = {"encoder_hidden_states": embeddings.float()} if isinstance(block, CrossAttnDownBlock2D) else {}
            hidden, _ = block(hidden, time, **prompt)
        return self.leave(hidden.mean((2, 3))).squeeze(1)


class GradientNetwork(nn.Module):
    """Learned part of grad_x log F(x_t), [B, C, H, W]: a small U-Net, cross-attention in all blocks but the deepest."""

    def __init__(self, channels: int, cross_attention_dim: int | None, widths: Sequence[int]) -> None:
        super().__init__()
        self.conditional = cross_attention_dim is not None
        inner, attention = len(widths) - 1, "CrossAttn" if self.conditional else ""
        options: dict[str, Any] = {"in_channels": channels, "out_channels": channels, "layers_per_block": 1}
        options |= {"block_out_channels": tuple(widths), "norm_num_groups": min(32, widths[0] // 4)}
        options["down_block_types"] = (f"{attention}DownBlock2D",) * inner + ("DownBlock2D",)
        options["up_block_types"] = ("UpBlock2D",) + (f"{attention}UpBlock2D",) * inner
        options["attention_head_dim"] = max(1, widths[0] // (8 if self.conditional else 4))
        if self.conditional:
            self.unet = UNet2DConditionModel(cross_attention_dim=cross_attention_dim, **options)
        else:
            self.unet = UNet2DModel(**options)
        nn.init.zeros_(self.unet.conv_out.weight)
        nn.init.zeros_(self.unet.conv_out.bias)

    def forward(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        prompt = {"encoder_hidden_states": embeddings.float()} if self.conditional else {}
        return self.unet(x.float(), t, **prompt).sample
