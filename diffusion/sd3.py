"""Stable Diffusion 3 and 3.5: a transformer that predicts the velocity of a rectified flow, two CLIP encoders, and T5
where the pipeline has one."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffusion.base_model import BaseModel
from diffusion.parts import without_weights

POOLED = -1  # the row of an embedding that holds the pooled one, filled up with zeros


class StableDiffusion3(BaseModel):
    """Embeddings [L + 1, E] are the pipeline's own: of CLIP and T5 in L rows, and the pooled one."""

    @property
    def embedding_width(self) -> int:
        return self.unet.config.joint_attention_dim

    @cached_property
    def texts(self) -> Any:
        pipeline = super().texts
        pipeline.transformer = without_weights(self.path)[0]  # whose configuration says how wide a missing T5 would be
        return pipeline

    def _encode(self, prompt: str) -> Tensor:
        rows, _, pooled, _ = self.texts.encode_prompt(
            prompt,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._t5_tokens,
        )
        return torch.cat([rows[0], torch.nn.functional.pad(pooled, (0, rows.shape[-1] - pooled.shape[1]))])

    def _output(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        assert self._times is not None, "kernel() first: it has the grid that t counts on"
        return velocity(self.unet, x.to(self.dtype), self._times[t], embeddings.to(self.dtype)).float()


def velocity(transformer: Any, x: Tensor, time: Tensor, embeddings: Tensor) -> Tensor:
    """[B, C, H, W], of latents x at the scheduler's timesteps `time` [B]."""
    pooled = embeddings[:, POOLED, : transformer.config.pooled_projection_dim]
    return transformer(x, embeddings[:, :POOLED], pooled, time).sample
