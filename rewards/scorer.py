"""Scoring a chunk's clean predictions: decode, reward, and refuse what is not a number."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from diffusion import noise
from diffusion.trajectory import Chunk, CleanPredictions, Scores
from rewards import Reward

SCORE_BATCH = 64
GRADIENT_BATCH = 16  # decoding with a graph to go back keeps every layer


class BadReward(ValueError):
    """A reward that failed, or is not finite: a data failure, never retried. Names reward, prompt and trajectory."""


class Scorer:
    """A decoder and a reward. Plain Python; actors/ wraps it."""

    def __init__(
        self, decoder: Callable[[torch.Tensor], torch.Tensor], reward: Reward, shuffle: bool = False,
        thumbnail_pixels: int = 0, gradients: bool = False,
    ) -> None:  # fmt: skip
        """`decoder` turns latents [B, C, h, w] into images. `shuffle` hands every training trajectory the rewards of
        another of its chunk: a control without signal. `thumbnail_pixels` is the side of the small pictures kept of
        training trajectories; 0: none. `gradients`: also those of the reward to the clean latents of training
        trajectories.

        Raises:
            BadReward: `gradients` of a reward that is not differentiable.
        """
        if gradients and not reward.differentiable:
            raise BadReward(f"reward {reward.name} is not differentiable: the objective cannot learn from its gradient")
        self.decoder, self.reward, self.shuffle = decoder, reward, shuffle
        self.thumbnail_pixels, self.gradients = thumbnail_pixels, gradients

    def score(self, clean: CleanPredictions) -> Scores:
        """One raw reward for each clean latent, laid out by trajectory and state [B, N+1], and its gradient.

        Raises:
            BadReward: the reward raised, or it or its gradient is NaN or infinite somewhere.
        """
        chunk = clean.chunk
        rewards = np.full((len(chunk.prompts), clean.num_steps + 1), np.nan, np.float32)
        pictures: list[np.ndarray] = []
        wanted = chunk.purpose == "evaluate" or self.thumbnail_pixels > 0
        differentiate = self.gradients and chunk.purpose == "train"
        gradients: list[np.ndarray] = []
        size = GRADIENT_BATCH if differentiate else SCORE_BATCH
        for start in range(0, len(clean.latents), size):
            part = slice(start, start + size)
            row, step = clean.row[part], clean.step[part]
            latents = torch.from_numpy(np.array(clean.latents[part])).requires_grad_(differentiate)
            prompts = [chunk.prompts[r] for r in row]
            with torch.set_grad_enabled(differentiate):
                images = self.decoder(latents)
                scores = self._judge(images, prompts)
            if differentiate:
                gradients.append(self._gradient(scores, latents, chunk, row, step))
            values, images = scores.detach().cpu().numpy(), images.detach()
            for r, s, value in zip(row, step, values, strict=True):
                if not np.isfinite(value):
                    raise BadReward(
                        f"reward {self.reward.name} returned {value} for prompt {chunk.prompts[r]!r}, "
                        f"trajectory {chunk.trajectory_ids[r]} of {chunk.where}, state {s}"
                    )
            rewards[row, step] = values
            if wanted and (last := step == clean.num_steps).any():
                pixels = images[torch.from_numpy(last)].mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
                pictures.extend(pixels.cpu().numpy())
        if self.shuffle and chunk.purpose == "train":
            order = noise.generator(chunk.seed, noise.SHUFFLE, chunk.epoch, chunk.index).permutation(len(rewards))
            shuffled = np.empty_like(rewards)
            shuffled[order] = rewards[np.roll(order, 1)]  # nobody keeps their own
            rewards = shuffled
        if chunk.purpose == "evaluate":
            return Scores(chunk, rewards, images=np.stack(pictures))
        scored = Scores(chunk, rewards, thumbnails=tuple(self._thumbnail(picture) for picture in pictures))
        if not differentiate:
            return scored
        index = np.full(rewards.shape, -1, np.int64)
        index[clean.row, clean.step] = np.arange(len(clean.row))
        return replace(scored, gradients=np.concatenate(gradients), gradient_row=index)

    def _gradient(
        self, scores: torch.Tensor, latents: torch.Tensor, chunk: Chunk, row: np.ndarray, step: np.ndarray
    ) -> np.ndarray:
        """[b, C, H, W] float32 of each latent's own score, through reward and decoder."""
        found = None
        if scores.requires_grad:
            try:
                (found,) = torch.autograd.grad(scores.sum(), latents, allow_unused=True)
            except Exception as error:  # a user's code may raise anything
                raise BadReward(
                    f"the gradient of reward {self.reward.name} failed on {len(scores)} images: "
                    f"{type(error).__name__}: {error}"
                ) from error
        if found is None:
            raise BadReward(
                f"reward {self.reward.name} says that it is differentiable, but autograd finds no way from its scores "
                "back to the images (a detach, a no_grad or a step outside torch)"
            )
        for r, s, gradient in zip(row, step, found, strict=True):
            if not torch.isfinite(gradient).all():
                raise BadReward(
                    f"the gradient of reward {self.reward.name} is not finite for prompt {chunk.prompts[r]!r}, "
                    f"trajectory {chunk.trajectory_ids[r]} of {chunk.where}, state {s}"
                )
        return found.cpu().numpy()

    def _thumbnail(self, picture: np.ndarray) -> bytes:
        side = (self.thumbnail_pixels, self.thumbnail_pixels)
        file = io.BytesIO()
        Image.fromarray(picture).resize(side, Image.Resampling.BICUBIC).save(file, "PNG")
        return file.getvalue()

    def _judge(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        try:
            return self.reward(images, prompts)
        except Exception as error:  # a user's code may raise anything
            raise BadReward(
                f"reward {self.reward.name} failed on {len(images)} images with prompts from {prompts[0]!r} to "
                f"{prompts[-1]!r}: {type(error).__name__}: {error}"
            ) from error
