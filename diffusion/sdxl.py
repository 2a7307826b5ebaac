"""Stable Diffusion XL: a U-Net that is also told a pooled embedding and the picture's size; two CLIP encoders."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffusion.base_model import BaseModel
from diffusion.parts import magnification

POOLED = -1  # the row of an embedding that holds the pooled one, filled up with zeros


class StableDiffusionXL(BaseModel):
    """Embeddings [L + 1, E] are the pipeline's own, of both encoders side by side, and the pooled one; those of the
    empty prompt are zero where the pipeline's are. The U-Net is told that pictures are not cropped."""

    @cached_property
    def _time_ids(self) -> Tensor:
        size = self.latent_shape[1] * magnification(self.path)
        return torch.tensor([size, size, 0, 0, size, size], dtype=self.dtype, device=self.device)

    def _encode(self, prompt: str) -> Tensor:
        rows, empty_rows, pooled, empty_pooled = self.texts.encode_prompt(prompt, device=self.device)
        if not prompt:
            rows, pooled = empty_rows, empty_pooled
        return torch.cat([rows[0], torch.nn.functional.pad(pooled, (0, rows.shape[-1] - pooled.shape[1]))])

    def _output(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        return predicted(self.unet, x.to(self.dtype), t, embeddings.to(self.dtype), self._time_ids).float()


def predicted(unet: Any, x: Tensor, t: Tensor, embeddings: Tensor, time_ids: Tensor) -> Tensor:
    """The U-Net's output [B, C, H, W] at latents x, timesteps t [B]; `time_ids` [6]."""
    width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    more = {"text_embeds": embeddings[:, POOLED, :width], "time_ids": time_ids.expand(len(x), -1)}
    return unet(x, t, encoder_hidden_states=embeddings[:, :POOLED], added_cond_kwargs=more).sample
