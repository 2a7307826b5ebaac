"""FLUX.1: a transformer that predicts the velocity of a rectified flow from packed latents; CLIP's pooled embedding and
T5's. Guidance is a number that the network is told, in one pass: it was distilled from a guided model."""

from typing import Any

import torch
from torch import Tensor

from diffusion.base_model import BaseModel
from diffusion.parts import PACKED

POOLED = -1  # the row of an embedding that holds the pooled one, filled up with zeros


class Flux(BaseModel):
    """Embeddings [L + 1, E] are T5's in L rows, and the pooled one of CLIP."""

    @property
    def embedding_width(self) -> int:
        return self.unet.config.joint_attention_dim

    def _encode(self, prompt: str) -> Tensor:
        rows, pooled, _ = self.texts.encode_prompt(
            prompt, None, device=self.device, max_sequence_length=self._t5_tokens
        )
        return torch.cat([rows[0], torch.nn.functional.pad(pooled, (0, rows.shape[-1] - pooled.shape[1]))])

    def predict(self, x: Tensor, t: Tensor, embeddings: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
        """The same twice: there is no output without guidance."""
        assert self._times is not None, "kernel() first: it has the grid that t counts on"
        inputs = x.to(self.dtype), self._times[t], embeddings.to(self.dtype), guidance
        output = velocity(self.unet, *inputs).float()
        return output, output


def velocity(transformer: Any, x: Tensor, time: Tensor, embeddings: Tensor, guidance: float) -> Tensor:
    """[B, C, H, W], of latents x at the scheduler's timesteps `time` [B]."""
    count, channels, height, width = x.shape
    rows, columns = height // PACKED, width // PACKED
    packed = (
        x.reshape(count, channels, rows, PACKED, columns, PACKED).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    )
    places = torch.cartesian_prod(*(torch.arange(size, device=x.device) for size in (rows, columns)))
    places = torch.cat([torch.zeros_like(places[:, :1]), places], 1).to(x.dtype)
    text = embeddings[:, :POOLED]
    told = torch.full((count,), guidance, device=x.device) if transformer.config.guidance_embeds else None
    output = transformer(
        hidden_states=packed, timestep=time.to(x.dtype) / 1000, guidance=told,
        encoder_hidden_states=text,
        pooled_projections=embeddings[:, POOLED, : transformer.config.pooled_projection_dim],
        txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype), img_ids=places,
    ).sample  # fmt: skip
    unpacked = output.reshape(count, rows, columns, channels, PACKED, PACKED).permute(0, 3, 1, 4, 2, 5)
    return unpacked.reshape(count, channels, height, width)
