"""Scoring a chunk's clean predictions: decode, reward, and refuse what is not a number."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from diffusion import memory, noise
from diffusion.trajectory import Chunk, CleanPredictions, Scores
from rewards import Reward
from rewards.package import PackageReward
from rewards.weighted_sum import WeightedSum

Decode = Callable[[torch.Tensor], torch.Tensor]  # latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1]
SCORE_BATCH = 32  # on a CPU
GRADIENT_BATCH = 16  # there; decoding with a graph to go back keeps every layer
MOST, PACKAGE_MOST = 256, 16


class BadReward(ValueError):
    """A reward that failed, or is not finite: a data failure, never retried. Names reward, prompt and trajectory."""


class Scorer:
    """A decoder and a reward. Plain Python; actors/ wraps it."""

    def __init__(
        self, decoder: Decode, reward: Reward, shuffle: bool = False, thumbnail_pixels: int = 0,
        gradients: bool = False, tiny: Decode | None = None, batch: int | None = None,
    ) -> None:  # fmt: skip
        """`shuffle` hands every training trajectory the rewards of
        another of its chunk: a control without signal. `thumbnail_pixels` is the side of the small pictures kept of
        training trajectories; 0: none. `gradients`: also those of the reward to the clean latents of training
        trajectories. `tiny` decodes the clean predictions of inner states in the decoder's place: psi may be any
        function of the state, the image's own reward may not. `batch` images go through decoder and reward at once;
        None: as `fitting_batch` finds.

        Raises:
            BadReward: `gradients` of a reward that is not differentiable.
        """
        if gradients and not reward.differentiable:
            raise BadReward(f"reward {reward.name} is not differentiable: the objective cannot learn from its gradient")
        self.decoder, self.reward, self.shuffle, self.tiny = decoder, reward, shuffle, tiny
        self.thumbnail_pixels, self.gradients, self.batch = thumbnail_pixels, gradients, batch

    def fitting_batch(
        self, latent: tuple[int, int, int], prompt: str, device: str, share: float = 1.0
    ) -> int:  # fmt: skip
        """Images that decoder and reward hold at once in this process's `share` of the free GPU memory: the largest
        power of two. Rewards depend on it in their last bits, so it is found once a run. Elsewhere a constant."""
        if device != "cuda":
            return GRADIENT_BATCH if self.gradients else SCORE_BATCH

        def trial(size: int) -> None:
            latents = torch.zeros(size, *latent, device=device, requires_grad=self.gradients)
            with torch.set_grad_enabled(self.gradients):
                scores, _ = self._judge(self.decoder(latents), [prompt] * size)
            if self.gradients:
                self._differentiate(scores, latents)

        # A package has its memory in a process of its own, where it is not seen from here.
        most = PACKAGE_MOST if isinstance(self.reward, PackageReward) else MOST
        with memory.smaller("reward.batch", 1):
            return memory.largest_batch(trial, torch.device(device), most, share)

    def rest(self) -> None:
        """Between turns on a shared GPU."""
        memory.release(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def score(self, clean: CleanPredictions) -> Scores:
        """One raw reward for each clean latent, laid out by trajectory and state [B, N+1], and its gradient.

        Raises:
            BadReward: the reward raised, or it or its gradient is NaN or infinite somewhere.
            OutOfMemory: the batch is too large for the GPU.
        """
        with memory.smaller("reward.batch", self.batch):
            return self._score(clean)

    def _score(self, clean: CleanPredictions) -> Scores:
        chunk = clean.chunk
        rewards = np.full((len(chunk.prompts), clean.num_steps + 1), np.nan, np.float32)
        pictures: list[np.ndarray] = []
        wanted = chunk.purpose == "evaluate" or self.thumbnail_pixels > 0
        differentiate = self.gradients and chunk.purpose == "train"
        gradients: list[np.ndarray] = []
        parts: dict[str, np.ndarray] = {}
        for part, decoder in self._batches(clean, differentiate):
            row, step = clean.row[part], clean.step[part]
            latents = torch.from_numpy(clean.latents[part].astype(np.float32)).requires_grad_(differentiate)
            prompts = [chunk.prompts[r] for r in row]
            with torch.set_grad_enabled(differentiate):
                images = decoder(latents)
                scores, terms = self._judge(images, prompts)
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
            at_end = step == clean.num_steps
            for label, term in terms.items():
                parts.setdefault(label, np.full(len(rewards), np.nan, np.float32))
                parts[label][row[at_end]] = term.detach().float().cpu().numpy()[at_end]
            if wanted and at_end.any():
                pixels = images[torch.from_numpy(at_end)].mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)
                pictures.extend(pixels.cpu().numpy())
        if self.shuffle and chunk.purpose == "train":
            order = noise.generator(chunk.seed, noise.SHUFFLE, chunk.epoch, chunk.index).permutation(len(rewards))
            shuffled = np.empty_like(rewards)
            shuffled[order] = rewards[np.roll(order, 1)]  # nobody keeps their own
            rewards = shuffled
        if chunk.purpose == "evaluate":
            return Scores(chunk, rewards, images=np.stack(pictures), parts=parts)
        thumbnails = tuple(self._thumbnail(picture) for picture in pictures)
        scored = Scores(chunk, rewards, thumbnails=thumbnails, parts=parts)
        if not differentiate:
            return scored
        index = np.full(rewards.shape, -1, np.int64)
        order = np.concatenate([part for part, _ in self._batches(clean, differentiate)])
        index[clean.row[order], clean.step[order]] = np.arange(len(order))
        return replace(scored, gradients=np.concatenate(gradients), gradient_row=index)

    def _batches(self, clean: CleanPredictions, differentiate: bool) -> Iterator[tuple[np.ndarray, Decode]]:
        """Positions of the latents that are decoded together, and the decoder: `tiny` only for inner states."""
        size = self.batch or (GRADIENT_BATCH if differentiate else SCORE_BATCH)
        inner = clean.step < clean.terminal if self.tiny else np.zeros(len(clean.step), bool)
        for group, decoder in ((np.flatnonzero(inner), self.tiny), (np.flatnonzero(~inner), self.decoder)):
            for start in range(0, len(group), size):
                assert decoder is not None
                yield group[start : start + size], decoder

    def _gradient(
        self, scores: torch.Tensor, latents: torch.Tensor, chunk: Chunk, row: np.ndarray, step: np.ndarray
    ) -> np.ndarray:
        """[b, C, H, W] float32 of each latent's own score, finite."""
        found = self._differentiate(scores, latents)
        for r, s, gradient in zip(row, step, found, strict=True):
            if not torch.isfinite(gradient).all():
                raise BadReward(
                    f"the gradient of reward {self.reward.name} is not finite for prompt {chunk.prompts[r]!r}, "
                    f"trajectory {chunk.trajectory_ids[r]} of {chunk.where}, state {s}"
                )
        return found.cpu().numpy()

    def _differentiate(self, scores: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """[b, C, H, W] of each latent's own score, through reward and decoder."""
        found = None
        if scores.requires_grad:
            try:
                (found,) = torch.autograd.grad(scores.sum(), latents, allow_unused=True)
            except torch.OutOfMemoryError:
                raise
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
        return found

    def _thumbnail(self, picture: np.ndarray) -> bytes:
        side = (self.thumbnail_pixels, self.thumbnail_pixels)
        file = io.BytesIO()
        Image.fromarray(picture).resize(side, Image.Resampling.BICUBIC).save(file, "PNG")
        return file.getvalue()

    def _judge(self, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Scores [B], and of a sum of rewards each one's own [B]."""
        try:
            if isinstance(self.reward, WeightedSum):
                terms = self.reward.parts(images, prompts)
                return self.reward.total(terms, images.device), terms
            return self.reward(images, prompts), {}
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a user's code may raise anything
            raise BadReward(
                f"reward {self.reward.name} failed on {len(images)} images with prompts from {prompts[0]!r} to "
                f"{prompts[-1]!r}: {type(error).__name__}: {error}"
            ) from error
