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
from rewards.registry import Reward
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


@dataclass(frozen=True)
class _Judged:
    """One batch of b latents."""

    values: np.ndarray  # [b] float32
    gradients: np.ndarray | None  # [b, C, h, w] float32, of each latent's own score
    terms: dict[str, np.ndarray]  # [b] float32: of a sum of rewards each one's own
    pictures: list[np.ndarray]  # [H, W, 3] uint8 of its terminal states

    @classmethod
    def joined(cls, parts: Sequence[_Judged]) -> _Judged:
        labels = {label: None for part in parts for label in part.terms}  # in their order
        if len(parts) == 1:
            return parts[0]

        def term(part: _Judged, label: str) -> np.ndarray:
            return part.terms.get(label, np.full_like(part.values, np.nan))

        return cls(
            np.concatenate([part.values for part in parts]),
            None if parts[0].gradients is None else np.concatenate([part.gradients for part in parts]),  # type: ignore
            {label: np.concatenate([term(part, label) for part in parts]) for label in labels},
            [picture for part in parts for picture in part.pictures],
        )


class _Faults:
    """What is bad in a chunk, by row, the first reason of each; or the end of the run."""

    def __init__(self, chunk: Chunk, quarantine: bool) -> None:
        self.chunk, self.quarantine = chunk, quarantine
        self.bad: dict[int, str] = {}
        self.undecodable: set[int] = set()
        self.raised: set[int] = set()

    def add(self, row: int, step: int, reason: str, undecodable: bool = False, raised: bool = False) -> None:
        """
        Raises:
            BadReward: bad trajectories are not set aside.
        """
        row, chunk = int(row), self.chunk
        if not self.quarantine:
            raise BadReward(
                f"{reason} for prompt {chunk.prompts[row]!r}, trajectory {chunk.trajectory_ids[row]} of {chunk.where}, "
                f"state {step} ({REMEDY})"
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
                f"all {len(self.bad)} trajectories of chunk {self.chunk.index} of {self.chunk.where} are bad{broken}; "
                f"the first: {self.bad[min(self.bad)]}"
            )


class Scorer:
    """A decoder and a reward. Plain Python; actors/ wraps it."""

    def __init__(
        self, decoder: Decode, reward: Reward, shuffle: bool = False, thumbnail_pixels: int = 0,
        gradients: bool = False, tiny: Decode | None = None, batch: int | None = None, quarantine: bool = False,
        allow_black: bool = False, judges: Judges | None = None,
    ) -> None:  # fmt: skip
        """`shuffle` hands every training trajectory the rewards of
        another of its chunk: a control without signal. `thumbnail_pixels` is the side of the small pictures kept of
        training trajectories; 0: none. `gradients`: also those of the reward to the clean latents of training
        trajectories. `tiny` decodes the clean predictions of inner states in the decoder's place: psi may be any
        function of the state, the image's own reward may not. `batch` images go through decoder and reward at once;
        None: as `fitting_batch` finds. `quarantine`: bad trajectories are reported in `Scores.bad` and not raised.
        `allow_black`: an all-black image is not bad. `judges` see evaluation images, besides the reward.

        Raises:
            BadReward: `gradients` of a reward that is not differentiable.
        """
        if gradients and not reward.differentiable:
            raise BadReward(f"reward {reward.name} is not differentiable: the objective cannot learn from its gradient")
        self.decoder, self.reward, self.shuffle, self.tiny = decoder, reward, shuffle, tiny
        self.thumbnail_pixels, self.gradients, self.batch = thumbnail_pixels, gradients, batch
        self.quarantine, self.allow_black, self.judges = quarantine, allow_black, judges

    def fitting_batch(
        self, latent: tuple[int, int, int], prompt: str, device: str, share: float = 1.0
    ) -> int:  # fmt: skip
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
        chunk = clean.chunk
        rewards = np.full((len(chunk.prompts), clean.num_steps + 1), np.nan, np.float32)
        differentiate = self.gradients and chunk.purpose == "train"
        faults = _Faults(chunk, self.quarantine)
        batches = list(self._batches(clean, differentiate))
        judged = _Judged.joined([self._judge_batch(clean, *batch, differentiate, faults) for batch in batches])
        order = np.concatenate([part for part, _ in batches])
        row, step = clean.row[order], clean.step[order]
        rewards[row, step] = judged.values
        if len(set(row.tolist())) == len(rewards):  # the whole chunk, not one row of it
            faults.check_some_good(self.reward.name)
        bad = faults.bad
        rewards[list(bad)] = np.nan
        at_end = step == clean.num_steps
        parts: dict[str, np.ndarray] = {}
        for label, values in judged.terms.items():
            parts[label] = np.full(len(rewards), np.nan, np.float32)
            parts[label][row[at_end]] = values[at_end]
            parts[label][list(bad)] = np.nan
        shown = dict(zip(row[at_end].tolist(), judged.pictures, strict=True))
        scores = Scores(
            chunk, self._shuffled(chunk, rewards, bad), parts=parts, bad=bad,
            bad_images={row: _png(shown[row]) for row in bad if row not in faults.undecodable},
        )  # fmt: skip
        if chunk.purpose == "evaluate":
            return self._judged_further(scores, np.stack(judged.pictures), row[at_end])
        if self.thumbnail_pixels:
            scores = replace(
                scores, thumbnails=tuple(_png(picture, self.thumbnail_pixels) for picture in judged.pictures)
            )
        if not differentiate:
            return scores
        index = np.full(rewards.shape, -1, np.int64)
        index[row, step] = np.arange(len(order))
        index[list(bad)] = -1
        return replace(scores, gradients=judged.gradients, gradient_row=index)

    def _judged_further(self, scores: Scores, pictures: np.ndarray, rows: np.ndarray) -> Scores:
        """An evaluation chunk's `pictures` [b, H, W, 3], of trajectories `rows` [b], before the other judges."""
        scores = replace(scores, images=pictures)
        if self.judges is None:
            return scores
        try:
            by_label, features = self.judges(
                pictures, [scores.chunk.prompts[r] for r in rows], self.batch or SCORE_BATCH
            )  # fmt: skip
        except HeldOutRaised as error:
            raise BadReward(str(error)) from error

        def by_row(values: np.ndarray) -> np.ndarray:
            found = np.full((len(scores.rewards), *values.shape[1:]), np.nan, np.float32)
            found[rows] = values
            found[list(scores.bad)] = np.nan
            return found

        return replace(
            scores, held_out={label: by_row(values) for label, values in by_label.items()}, features=by_row(features)
        )

    def _judge_batch(
        self, clean: CleanPredictions, part: np.ndarray, decoder: Decode, differentiate: bool, faults: _Faults
    ) -> _Judged:
        """Decode and score the latents at positions `part`. `faults` hears of each that is bad; the others' values do
        not depend on it. If the reward raises and bad trajectories are set aside, those it raises on alone are bad."""
        chunk, row, step = clean.chunk, clean.row[part], clean.step[part]
        latents = torch.from_numpy(clean.latents[part].astype(np.float32))
        for i in _not_finite(latents):
            faults.add(row[i], step[i], "latents that are not finite", undecodable=True)
        latents = latents.nan_to_num(0, 0, 0).requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            images = decoder(latents)
            for i in _not_finite(images.detach()):
                faults.add(row[i], step[i], "an image that is not finite", undecodable=True)
            images = images.nan_to_num(0, 0, 0)
            at_end = torch.from_numpy(step == clean.num_steps)
            shown = images.detach()[at_end].mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            for r, picture in zip(row[step == clean.num_steps], shown, strict=True):
                if not self.allow_black and not picture.any():
                    faults.add(r, clean.num_steps, BLACK)
            try:
                scores, terms = self._judge(images, [chunk.prompts[r] for r in row])
                gradients = self._differentiate(scores, latents) if differentiate else None
            except RewardRaised as error:
                if not self.quarantine:
                    raise BadReward(f"{error} ({REMEDY})") from error
                if len(part) > 1:
                    alone = [self._judge_batch(clean, part[i : i + 1], decoder, differentiate, faults)
                             for i in range(len(part))]  # fmt: skip
                    return _Judged.joined(alone)
                faults.add(row[0], step[0], str(error), raised=True)
                gradient = np.zeros(latents.shape, np.float32) if differentiate else None
                return _Judged(np.full(1, np.nan, np.float32), gradient, {}, list(shown))
        values = scores.detach().float().cpu().numpy()
        for i in np.flatnonzero(~np.isfinite(values)).tolist():
            faults.add(row[i], step[i], f"reward {self.reward.name} returned {values[i]}")
        for i in _not_finite(gradients) if gradients is not None else ():
            faults.add(row[i], step[i], f"the gradient of reward {self.reward.name} is not finite")
        return _Judged(
            values,
            None if gradients is None else gradients.cpu().numpy(),
            {label: term.detach().float().cpu().numpy() for label, term in terms.items()},
            list(shown),
        )

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
        found = None
        if scores.requires_grad:
            try:
                (found,) = torch.autograd.grad(scores.sum(), latents, allow_unused=True)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a user's code may raise anything
                raise RewardRaised(
                    f"the gradient of reward {self.reward.name} failed on {len(scores)} images: "
                    f"{type(error).__name__}: {error}"
                ) from error
        if found is None:
            raise BadReward(
                f"reward {self.reward.name} says that it is differentiable, but autograd finds no way from its scores "
                "back to the images (a detach, a no_grad or a step outside torch)"
            )
        return found

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
            raise RewardRaised(
                f"reward {self.reward.name} failed on {len(images)} images with prompts from {prompts[0]!r} to "
                f"{prompts[-1]!r}: {type(error).__name__}: {error}"
            ) from error


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
