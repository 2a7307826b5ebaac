"""Scoring a chunk's clean predictions: decode, reward, and refuse what is not a number."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from diffusion import gpu_memory, noise
from diffusion.failures import RunFailure
from diffusion.trajectory import Chunk, CleanPredictions, Scores
from rewards.judges import HeldOutRaised, Judges
from rewards.package import PackageReward
from rewards.registry import Reward, named_failure
from rewards.weighted_sum import WeightedSum

Decode = Callable[[torch.Tensor], torch.Tensor]  # latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1]
SCORE_BATCH = 32  # on a CPU
GRADIENT_BATCH = 16  # there; decoding with a graph to go back keeps every layer
MOST, PACKAGE_MOST = 256, 16
REMEDY = "reward.on_bad_reward=quarantine sets such trajectories aside"
BLACK = (
    "an all-black image, mark of NaN latents or a safety checker (reward.black_images=allow where black may be right)"
)


class BadReward(RunFailure, ValueError):
    """A reward that failed, or is not finite: a data failure, never retried. Names reward, prompt and trajectory."""


class RewardRaised(BadReward):
    """The reward's own code raised on these images."""


class _Judgement:
    """What becomes known of a chunk's M latents, batch by batch; and which of its trajectories are bad."""

    def __init__(self, clean: CleanPredictions, gradients: bool, quarantine: bool) -> None:
        self.clean, self.chunk, self.quarantine = clean, clean.chunk, quarantine
        self.at_end = clean.step == clean.num_steps  # [M]
        self.rewards = np.full(len(clean.row), np.nan, np.float32)  # [M]
        # [M, C, h, w] of each latent's own score.
        self.gradients = np.zeros(clean.latents.shape, np.float32) if gradients else None
        self.parts: dict[str, np.ndarray] = {}  # [M] by label: of a sum of rewards each one's own
        self.pictures: dict[int, np.ndarray] = {}  # by trajectory, [H, W, 3] uint8 of its terminal state
        self.bad: dict[int, str] = {}  # by trajectory, the first reason
        self.undecodable: set[int] = set()
        self.raised: set[int] = set()

    def add_bad(self, position: int, reason: str, undecodable: bool = False, raised: bool = False) -> None:
        """The trajectory of the latent at `position` must not be used.

        Raises:
            BadReward: bad trajectories are not set aside.
        """
        row, step, chunk = int(self.clean.row[position]), self.clean.step[position], self.chunk
        if not self.quarantine:
            raise BadReward(
                f"{reason} for prompt {chunk.prompts[row]!r}, trajectory {chunk.trajectory_ids[row]} of "
                f"{chunk.key.where}, state {step} ({REMEDY})"
            )
        self.bad.setdefault(row, f"{reason}, state {step}")
        if undecodable:
            self.undecodable.add(row)
        if raised:
            self.raised.add(row)

    def check_some_good(self, reward: str) -> None:
        """
        Raises:
            BadReward: nothing of the chunk can be used.
        """
        if len(self.bad) == len(self.chunk.prompts):
            broken = f": reward {reward} is broken" if len(self.raised) == len(self.bad) else ""
            raise BadReward(
                f"all {len(self.bad)} trajectories of {self.chunk.key} are bad{broken}; "
                f"the first: {self.bad[min(self.bad)]}"
            )

    def by_trajectory(self, values: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """[B, ...] from `values` of the trajectories `rows`; NaN of the others and of bad ones."""
        laid_out = np.full((len(self.chunk.prompts), *values.shape[1:]), np.nan, np.float32)
        laid_out[rows] = values
        laid_out[list(self.bad)] = np.nan
        return laid_out


@dataclass
class Scorer:
    """A decoder and a reward. Plain Python; actors/ wraps it.

    Raises:
        BadReward: `gradients` of a reward that is not differentiable.
    """

    decoder: Decode
    reward: Reward
    shuffle: bool = False  # every training trajectory gets another's rewards, of its chunk: a control without signal
    thumbnail_pixels: int = 0  # side of the small pictures kept of training trajectories; 0: none
    gradients: bool = False  # also those of the reward to the clean latents of training trajectories
    # Decodes clean predictions of inner states: psi may be any function of the state, the image's own reward may not.
    tiny: Decode | None = None
    batch: int | None = None  # images through decoder and reward at once; None: as on a CPU
    quarantine: bool = False  # bad trajectories are in `Scores.bad`, and not raised
    allow_black: bool = False  # an all-black image is not bad
    judges: Judges | None = None  # see evaluation images, besides the reward

    def __post_init__(self) -> None:
        if self.gradients and not self.reward.differentiable:
            name = self.reward.name
            raise BadReward(f"reward {name} is not differentiable: the objective cannot learn from its gradient")

    def fitting_batch(self, latent: tuple[int, int, int], prompt: str, device: str, share: float = 1.0) -> int:
        """Images that decoder and reward hold at once in this process's `share` of the free GPU memory: the largest
        power of two. Rewards depend on it in their last bits, so it is found once a run. Elsewhere a constant."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
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
        with gpu_memory.smaller("reward.batch", 1):
            return gpu_memory.largest_batch(trial, torch.device(device), most, share)

    def rest(self) -> None:
        """Between turns on a shared GPU."""
        gpu_memory.release(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def score(self, clean: CleanPredictions) -> Scores:
        """One raw reward for each clean latent, laid out by trajectory and state [B, N+1], and its gradient.

        Raises:
            BadReward: the reward raised, or it or its gradient is NaN or infinite somewhere, an image is black, latents
                are not numbers; where bad trajectories are set aside, only if none of the chunk is good.
            OutOfMemory: the batch is too large for the GPU.
        """
        with gpu_memory.smaller("reward.batch", self.batch):
            return self._score(clean)

    def _score(self, clean: CleanPredictions) -> Scores:
        chunk, row, step = clean.chunk, clean.row, clean.step
        differentiate = self.gradients and chunk.purpose == "train"
        judged = _Judgement(clean, differentiate, self.quarantine)
        for positions, decoder in self._batches(clean, differentiate):
            self._judge_batch(judged, positions, decoder)
        if len(set(row.tolist())) == len(chunk.prompts):  # the whole chunk, not one row of it
            judged.check_some_good(self.reward.name)
        bad, at_end = judged.bad, judged.at_end
        rewards = np.full((len(chunk.prompts), clean.num_steps + 1), np.nan, np.float32)
        rewards[row, step] = judged.rewards
        rewards[list(bad)] = np.nan
        scores = Scores(
            chunk, self._shuffled(chunk, rewards, bad), bad=bad,
            parts={label: judged.by_trajectory(part[at_end], row[at_end]) for label, part in judged.parts.items()},
            bad_images={row: _png(judged.pictures[row]) for row in bad if row not in judged.undecodable},
        )  # fmt: skip
        if chunk.purpose == "evaluate":
            return self._judged_further(scores, judged)
        if self.thumbnail_pixels:
            thumbnails = tuple(_png(picture, self.thumbnail_pixels) for picture in judged.pictures.values())
            scores = replace(scores, thumbnails=thumbnails)
        if not differentiate:
            return scores
        index = np.full(rewards.shape, -1, np.int64)
        index[row, step] = np.arange(len(row))
        index[list(bad)] = -1
        return replace(scores, gradients=judged.gradients, gradient_row=index)

    def _judged_further(self, scores: Scores, judged: _Judgement) -> Scores:
        """With an evaluation chunk's images, and what the other judges say of them."""
        rows, pictures = list(judged.pictures), np.stack(list(judged.pictures.values()))
        scores = replace(scores, images=pictures)
        if self.judges is None:
            return scores
        prompts = [scores.chunk.prompts[row] for row in rows]
        try:
            held_out, features = self.judges(pictures, prompts, self.batch or SCORE_BATCH)
        except HeldOutRaised as error:
            raise BadReward(str(error)) from error
        return replace(
            scores, features=judged.by_trajectory(features, rows),
            held_out={label: judged.by_trajectory(values, rows) for label, values in held_out.items()},
        )  # fmt: skip

    def _judge_batch(self, judged: _Judgement, positions: np.ndarray, decoder: Decode) -> None:
        """Decode and score the latents at `positions`. One that is bad does not change the others' values. If the
        reward raises and bad trajectories are set aside, those it raises on alone are bad."""
        clean, differentiate = judged.clean, judged.gradients is not None
        row, at_end = clean.row[positions], judged.at_end[positions]
        latents = torch.from_numpy(clean.latents[positions].astype(np.float32))
        for i in _not_finite(latents):
            judged.add_bad(positions[i], "latents that are not finite", undecodable=True)
        latents = latents.nan_to_num(0, 0, 0).requires_grad_(differentiate)
        gradients = None
        with torch.set_grad_enabled(differentiate):
            images = decoder(latents)
            for i in _not_finite(images.detach()):
                judged.add_bad(positions[i], "an image that is not finite", undecodable=True)
            images = images.nan_to_num(0, 0, 0)
            shown = images.detach()[torch.from_numpy(at_end)].mul(255).round().to(torch.uint8)
            for position, picture in zip(positions[at_end], shown.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                judged.pictures[int(clean.row[position])] = picture
                if not self.allow_black and not picture.any():
                    judged.add_bad(position, BLACK)
            try:
                scores, parts = self._judge(images, [clean.chunk.prompts[r] for r in row])
                if differentiate:
                    gradients = self._differentiate(scores, latents)
            except RewardRaised as error:
                if not self.quarantine:
                    raise BadReward(f"{error} ({REMEDY})") from error
                if len(positions) == 1:
                    judged.add_bad(positions[0], str(error), raised=True)
                    return
                for i in range(len(positions)):
                    self._judge_batch(judged, positions[i : i + 1], decoder)
                return
        judged.rewards[positions] = values = scores.detach().float().cpu().numpy()
        for i in np.flatnonzero(~np.isfinite(values)).tolist():
            judged.add_bad(positions[i], f"reward {self.reward.name} returned {values[i]}")
        if judged.gradients is not None and gradients is not None:
            judged.gradients[positions] = gradients.cpu().numpy()
            for i in _not_finite(gradients):
                judged.add_bad(positions[i], f"the gradient of reward {self.reward.name} is not finite")
        for label, part in parts.items():
            whole = judged.parts.setdefault(label, np.full_like(judged.rewards, np.nan))
            whole[positions] = part.detach().float().cpu().numpy()

    def _shuffled(self, chunk: Chunk, rewards: np.ndarray, bad: Mapping[int, str]) -> np.ndarray:
        """With train.shuffle_rewards, every good trajectory's rewards are another good one's."""
        if not self.shuffle or chunk.purpose != "train":
            return rewards
        good = np.array([row for row in range(len(rewards)) if row not in bad])
        order = noise.generator(chunk.seed, noise.SHUFFLE, chunk.epoch, chunk.index).permutation(len(good))
        shuffled = rewards.copy()
        shuffled[good[order]] = rewards[good[np.roll(order, 1)]]  # nobody keeps their own
        return shuffled

    def _batches(self, clean: CleanPredictions, differentiate: bool) -> Iterator[tuple[np.ndarray, Decode]]:
        """Positions of the latents that are decoded together, and the decoder: `tiny` only for inner states."""
        size = self.batch or (GRADIENT_BATCH if differentiate else SCORE_BATCH)
        inner = clean.step < clean.terminal if self.tiny else np.zeros(len(clean.step), bool)
        for group, decoder in ((np.flatnonzero(inner), self.tiny), (np.flatnonzero(~inner), self.decoder)):
            for start in range(0, len(group), size):
                assert decoder is not None
                yield group[start : start + size], decoder

    def _differentiate(self, scores: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """[b, C, H, W] of each latent's own score, through reward and decoder."""
        name, gradients = self.reward.name, None
        if scores.requires_grad:
            failed = f"the gradient of reward {name} failed on {len(scores)} images"
            with named_failure(RewardRaised, failed, self.reward):
                (gradients,) = torch.autograd.grad(scores.sum(), latents, allow_unused=True)
        if gradients is None:
            raise BadReward(
                f"reward {name} says that it is differentiable, but autograd finds no way from its scores back to the "
                "images (a detach, a no_grad or a step outside torch)"
            )
        return gradients

    def _judge(self, images: torch.Tensor, prompts: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Scores [B], and of a sum of rewards each one's own [B]."""
        about = f"{len(images)} images with prompts from {prompts[0]!r} to {prompts[-1]!r}"
        with named_failure(RewardRaised, f"reward {self.reward.name} failed on {about}", self.reward):
            if isinstance(self.reward, WeightedSum):
                parts = self.reward.parts(images, prompts)
                return self.reward.total(parts, images.device), parts
            return self.reward(images, prompts), {}


def _not_finite(values: torch.Tensor) -> list[int]:
    """Rows of [b, ...] that hold a NaN or an infinity."""
    return torch.nonzero(~values.flatten(1).isfinite().all(1)).flatten().tolist()


def _png(picture: np.ndarray, pixels: int | None = None) -> bytes:
    """A file of [H, W, 3] uint8, made `pixels` square if that is given."""
    image, file = Image.fromarray(picture), io.BytesIO()
    if pixels:
        image = image.resize((pixels, pixels), Image.Resampling.BICUBIC)
    image.save(file, "PNG")
    return file.getvalue()
