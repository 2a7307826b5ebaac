"""Stable Diffusion 3 and 3.5: a transformer that predicts the velocity of a rectified flow, two CLIP encoders, and T5
where the pipeline has one."""

from typing import Any

import torch
from torch import Tensor

from diffusion.base_model import BaseModel
from diffusion.locate import load_errors, locate
from diffusion.parts import check_weights, reads_by_t5

POOLED = -1  # the row of an embedding that holds the pooled one, filled up with zeros


class StableDiffusion3(BaseModel):
    """Embeddings [L + 1, E] are the pipeline's own: of CLIP and T5 in L rows, and the pooled one. The text encoders run
    once a prompt, in float32."""

    def _load(self) -> None:
        from diffusers import StableDiffusion3Pipeline

        dtypes = {"transformer": self.dtype, "default": torch.float32}
        left_out = dict.fromkeys(("vae", "image_encoder", "feature_extractor"))
        left_out |= {} if reads_by_t5(self.path) else {"text_encoder_3": None, "tokenizer_3": None}
        with load_errors(self.path):
            pipeline: Any = StableDiffusion3Pipeline.from_pretrained(
                locate(self.path), dtype=dtypes, use_safetensors=True, **left_out
            )
        self.unet = pipeline.transformer.to(self.device).requires_grad_(False).eval()
        check_weights(self.path, "transformer", self.unet)
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if (encoder := getattr(pipeline, name)) is not None:
                check_weights(self.path, name, encoder)
                encoder.to(self.device).requires_grad_(False).eval()
        self._pipeline, self._width = pipeline, self.unet.config.joint_attention_dim

    @property
    def embedding_width(self) -> int:
        return self._width

    def _encode(self, prompt: str) -> Tensor:
        rows, _, pooled, _ = self._pipeline.encode_prompt(
            prompt,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._t5_tokens,
        )
        return torch.cat([rows[0], torch.nn.functional.pad(pooled, (0, self._width - pooled.shape[1]))])

    def _output(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        assert self._times is not None, "kernel() first: it has the grid that t counts on"
        return velocity(self.unet, x.to(self.dtype), self._times[t], embeddings.to(self.dtype)).float()


def velocity(transformer: Any, x: Tensor, time: Tensor, embeddings: Tensor) -> Tensor:
    """[B, C, H, W], of latents x at the scheduler's timesteps `time` [B]."""
    pooled = embeddings[:, POOLED, : transformer.config.pooled_projection_dim]
    return transformer(x, embeddings[:, :POOLED], pooled, time).sample
