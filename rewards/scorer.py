"""Scoring a chunk's clean predictions: decode, reward, and refuse what is not a number."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from diffusion import noise
from diffusion.base_model import Decoder
from diffusion.trajectory import CleanPredictions, Scores
from rewards import Reward

SCORE_BATCH = 64


class BadReward(ValueError):
    """A reward that failed, or is not finite: a data failure, never retried. Names reward, prompt and trajectory."""


class Scorer:
    """A decoder and a reward. Plain Python; actors/ wraps it."""

    def __init__(self, decoder: Decoder, reward: Reward, shuffle: bool = False, thumbnail_pixels: int = 0) -> None:
        """`shuffle` hands every training trajectory the rewards of another of its chunk: a control without signal.
        `thumbnail_pixels` is the side of the small pictures kept of training trajectories; 0: none."""
        self.decoder, self.reward, self.shuffle = decoder, reward, shuffle
        self.thumbnail_pixels = thumbnail_pixels

    @torch.no_grad()
    def score(self, clean: CleanPredictions) -> Scores:
        """One raw reward for each clean latent, laid out by trajectory and state [B, N+1].

        Raises:
            BadReward: the reward raised, or is NaN or infinite somewhere.
        """
        chunk = clean.chunk
        rewards = np.full((len(chunk.prompts), clean.num_steps + 1), np.nan, np.float32)
        pictures: list[np.ndarray] = []
        wanted = chunk.purpose == "evaluate" or self.thumbnail_pixels > 0
        for start in range(0, len(clean.latents), SCORE_BATCH):
            part = slice(start, start + SCORE_BATCH)
            row, step = clean.row[part], clean.step[part]
            images = self.decoder(torch.from_numpy(np.array(clean.latents[part])))
            prompts = [chunk.prompts[r] for r in row]
            values = self._judge(images, prompts)
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
        return Scores(chunk, rewards, thumbnails=tuple(self._thumbnail(picture) for picture in pictures))

    def _thumbnail(self, picture: np.ndarray) -> bytes:
        side = (self.thumbnail_pixels, self.thumbnail_pixels)
        file = io.BytesIO()
        Image.fromarray(picture).resize(side, Image.Resampling.BICUBIC).save(file, "PNG")
        return file.getvalue()

    def _judge(self, images: torch.Tensor, prompts: list[str]) -> np.ndarray:
        try:
            return self.reward(images, prompts).cpu().numpy()
        except Exception as error:  # a user's code may raise anything
            raise BadReward(
                f"reward {self.reward.name} failed on {len(images)} images with prompts from {prompts[0]!r} to "
                f"{prompts[-1]!r}: {type(error).__name__}: {error}"
            ) from error
