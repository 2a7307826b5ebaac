"""Scoring a chunk's clean predictions: decode, reward, and refuse what is not a number."""

import io
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion import gpu_memory, noise
from diffusion.trajectory import CleanPredictions, Scores
from rewards.contract import Columns, Reward, call, told
from rewards.judges import Judges
from rewards.own_code import is_defect, named_failure
from rewards.registry import BadReward
from rewards.trial import require_whole_pictures
from rewards.weighted_sum import WeightedSum

Decode = Callable[[Tensor], Tensor]  # latents [B, C, h, w] -> images [B, 3, H, W] in [0, 1]
SCORE_BATCH, SCORE_PIXELS = 32, 2**20  # most images at once, and their pixels, where no GPU's memory says
GRADIENT_BATCH, GRADIENT_PIXELS = 16, 2**18  # there; decoding with a graph to go back keeps every layer
MOST = 256
REMEDY = "reward.on_bad_reward=quarantine sets such trajectories aside"
BAD_LATENTS, BAD_IMAGE = UNDECODABLE = ("latents that are not finite", "an image that is not finite")
BLACK = "an all-black image, of NaN latents or a safety checker (reward.black_images=allow where black may be right)"


class RewardRaised(BadReward):
    """The reward's own code raised on these images."""


class _Judgement:
    """What becomes known of a chunk's M latents, batch by batch; and which of its trajectories are bad."""

    def __init__(self, clean: CleanPredictions, gradients: bool, quarantine: bool) -> None:
        self.clean, self.chunk, self.quarantine = clean, clean.chunk, quarantine
        self.rewards = np.full(len(clean.row), np.nan, np.float32)  # [M]
        # [M, C, h, w] of each latent's own score.
        self.gradients = np.zeros(clean.latents.shape, np.float32) if gradients else None
        self.parts: dict[str, np.ndarray] = {}  # [M] by label: of a sum of rewards each one's own
        self.pictures: dict[int, np.ndarray] = {}  # by trajectory, [H, W, 3] uint8 of its terminal state
        self.bad: dict[int, str] = {}  # by trajectory, the first reason
        self.raised: set[int] = set()  # of them those on which the reward's own code raised

    def add_bad(self, position: int, reason: str, raised: bool = False) -> None:
        """The trajectory of the latent at `position` must not be used. Raises BadReward unless such are set aside."""
        row, step, chunk = int(self.clean.row[position]), self.clean.step[position], self.chunk
        if not self.quarantine:
            raise BadReward(
                f"{reason} for prompt {chunk.prompts[row]!r}, trajectory {chunk.trajectory_ids[row]} of "
                f"{chunk.key.where}, state {step} ({REMEDY})"
            )
        self.bad.setdefault(row, f"{reason}, state {step}")
        self.raised |= {row} if raised else set()

    def require_some_good(self, reward: str) -> None:
        """Raises BadReward where nothing of the chunk, a whole one and not one row of it, can be used."""
        if len(self.bad) == len(self.chunk.prompts) == len(set(self.clean.row.tolist())):
            broken = f": reward {reward} is broken" if self.raised == self.bad.keys() else ""
            bad, first = f"all {len(self.bad)} trajectories of {self.chunk.key} are bad", self.bad[min(self.bad)]
            raise BadReward(f"{bad}{broken}; the first: {first}")

    def by_trajectory(self, values: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """[B, ...] from `values` of the trajectories `rows`; NaN of the others and of bad ones."""
        laid_out = np.full((len(self.chunk.prompts), *values.shape[1:]), np.nan, np.float32)
        laid_out[rows] = values
        laid_out[list(self.bad)] = np.nan
        return laid_out


@dataclass
class Scorer:
    """A decoder and a reward. Plain Python; actors/ wraps it. Raises BadReward for `gradients` of a reward without."""

    decoder: Decode
    reward: Reward
    shuffle: bool = False  # every training trajectory gets another's rewards, of its chunk: a control without signal
    thumbnail_pixels: int = 0  # side of the small pictures kept of training trajectories; 0: none
    gradients: bool = False  # also those of the reward to the clean latents of training trajectories
    # Decodes clean predictions of inner states: psi may be any function of the state, the image's own reward may not.
    tiny: Decode | None = None
    batch: int | None = None  # images through decoder and reward at once; None: as many as `usual` says
    quarantine: bool = False  # bad trajectories are in `Scores.bad`, and not raised
    allow_black: bool = False  # an all-black image is not bad
    judges: Judges | None = None  # see evaluation images, besides the reward

    @property
    def most(self) -> int:
        """Images that the reward takes at once."""
        return told(self.reward, "batch") or MOST

    def __post_init__(self) -> None:
        self._decoding = threading.Lock()  # chunks that wait for a judge need no memory; one that is decoded does
        if self.gradients and not self.reward.differentiable:
            raise BadReward(f"reward {self.reward.name} is not differentiable, as the objective needs")

    def usual(self, side: int, gradients: bool) -> int:
        """Images at once, of latents of this side, where no GPU's memory says: by their pixels, since a decoder's
        memory grows with them (Stable Diffusion's: 3 kB a pixel, 12 kB with a gradient)."""
        pixels = (side * getattr(self.decoder, "magnification", 1)) ** 2
        return min(self.most, usual_batch(pixels, gradients))

    def fitting_batch(self, latent: tuple[int, int, int], prompt: str, device: str, share: float = 1.0) -> int:
        """Images at once in this process's `share` of the free GPU memory; elsewhere by their size. Found once a run:
        rewards depend on it in their last bits."""
        if device != "cuda" and not (device == "auto" and torch.cuda.is_available()):
            return self.usual(latent[-1], self.gradients)

        columns = getattr(prompt, "metadata", {})  # of a prompt file

        def trial(size: int) -> None:
            latents = torch.zeros(size, *latent, device="cuda", requires_grad=self.gradients)
            with torch.set_grad_enabled(self.gradients):
                scores, _ = self._judge(self.decoder(latents), [prompt] * size, [columns] * size)
            if self.gradients:
                self._differentiate(scores, latents)

        with gpu_memory.smaller("reward.batch", 1):
            return gpu_memory.largest_batch(trial, torch.device("cuda"), min(self.most, MOST), share)

    def rest(self) -> None:
        """Between turns on a shared GPU."""
        gpu_memory.release(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def score(self, clean: CleanPredictions) -> Scores:
        """One raw reward for each clean latent, laid out by trajectory and state [B, N+1], and its gradient. Raises
        BadReward where a trajectory is bad (where such are set aside, only if none is good); OutOfMemory."""
        chunk, row, step, at_end = clean.chunk, clean.row, clean.step, clean.step == clean.num_steps
        if not at_end.all():
            require_whole_pictures(self.reward, "the objective")  # it may not have been tried before
        judged = _Judgement(clean, self.gradients and chunk.purpose == "train", self.quarantine)
        inner = step < clean.terminal if self.tiny else np.zeros(len(step), bool)
        size = min(self.most, self.batch or self.usual(clean.latents.shape[-1], judged.gradients is not None))
        with gpu_memory.smaller("reward.batch", self.batch):
            for positions, decoder in ((np.flatnonzero(inner), self.tiny), (np.flatnonzero(~inner), self.decoder)):
                for start in range(0, len(positions), size):
                    self._judge_batch(judged, positions[start : start + size], decoder or self.decoder)
            judged.require_some_good(self.reward.name)
            further = self._judge_further(judged) if chunk.purpose == "evaluate" else {}
        rewards = np.full((len(chunk.prompts), clean.num_steps + 1), np.nan, np.float32)
        index = np.full(rewards.shape, -1, np.int64)
        rewards[row, step], index[row, step] = judged.rewards, np.arange(len(row))
        rewards[list(judged.bad)], index[list(judged.bad)] = np.nan, -1
        if judged.gradients is not None:
            further |= {"gradients": judged.gradients, "gradient_row": index}
        if chunk.purpose == "evaluate":
            further |= {"nats": clean.nats, "spread": clean.spread}
        if chunk.purpose == "train" and self.thumbnail_pixels:
            further["thumbnails"] = tuple(_png(picture, self.thumbnail_pixels) for picture in judged.pictures.values())
        parts = {label: judged.by_trajectory(part[at_end], row[at_end]) for label, part in judged.parts.items()}
        if chunk.purpose == "train" and self.shuffle:
            good = np.setdiff1d(np.arange(len(rewards)), list(judged.bad))
            order = noise.generator(chunk.seed, noise.SHUFFLE, chunk.epoch, chunk.index).permutation(len(good))
            for values in (rewards, *parts.values()):
                values[good[order]] = values[good[np.roll(order, 1)]]  # nobody keeps their own
        shown = [row for row, reason in judged.bad.items() if not reason.startswith(UNDECODABLE)]
        bad_images = {row: _png(judged.pictures[row]) for row in shown}
        return Scores(chunk, rewards, parts=parts, bad=judged.bad, bad_images=bad_images, **further)

    def _judge_further(self, judged: _Judgement) -> dict[str, Any]:
        rows, pictures = list(judged.pictures), np.stack(list(judged.pictures.values()))
        if self.judges is None:
            return {"images": pictures}
        prompts = [judged.chunk.prompts[row] for row in rows]
        metadata = judged.chunk.metadata_of(rows)
        held_out, features = self.judges(pictures, prompts, self.batch or SCORE_BATCH, metadata)
        held_out = {label: judged.by_trajectory(values, rows) for label, values in held_out.items()}
        return {"images": pictures, "held_out": held_out, "features": judged.by_trajectory(features, rows)}

    def _judge_batch(self, judged: _Judgement, positions: np.ndarray, decoder: Decode) -> None:
        """Decode and score the latents at `positions`. If the reward raises, those it raises on alone are bad."""
        clean, differentiate = judged.clean, judged.gradients is not None
        row, at_end = clean.row[positions], clean.step[positions] == clean.num_steps
        latents = torch.from_numpy(clean.latents[positions].astype(np.float32))
        for i in _not_finite(latents):
            judged.add_bad(positions[i], BAD_LATENTS)
        latents = latents.nan_to_num(0, 0, 0).requires_grad_(differentiate)
        gradients = None
        with torch.set_grad_enabled(differentiate):
            with self._decoding:
                images = decoder(latents)
            for i in _not_finite(images.detach()):
                judged.add_bad(positions[i], BAD_IMAGE)
            images = images.nan_to_num(0, 0, 0)
            shown = images.detach()[torch.from_numpy(at_end)].mul(255).round().to(torch.uint8)
            for position, picture in zip(positions[at_end], shown.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                judged.pictures[int(clean.row[position])] = picture
                if not self.allow_black and not picture.any():
                    judged.add_bad(position, BLACK)
            try:
                prompts, metadata = [clean.chunk.prompts[r] for r in row], clean.chunk.metadata_of(row)
                scores, parts = self._judge(images, prompts, metadata)
                if differentiate:
                    gradients = self._differentiate(scores, latents)
            except RewardRaised as error:
                if not self.quarantine:
                    advice = "" if is_defect(error.__cause__) else f" ({REMEDY})"
                    raise BadReward(f"{error}{advice}") from error
                if len(positions) == 1:
                    return judged.add_bad(positions[0], str(error), raised=True)
                for i in range(len(positions)):
                    self._judge_batch(judged, positions[i : i + 1], decoder)
                return None
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

    def _differentiate(self, scores: Tensor, latents: Tensor) -> Tensor:
        name, gradients = self.reward.name, None
        with named_failure(RewardRaised, f"the gradient of reward {name} failed on {len(scores)} images"):
            if scores.requires_grad:
                (gradients,) = torch.autograd.grad(scores.sum(), latents, allow_unused=True)
        if gradients is None:
            raise BadReward(
                f"reward {name} says that it is differentiable, but autograd finds no way from its scores back to the "
                "images (a detach, a no_grad or a step outside torch)"
            )
        return gradients

    def _judge(
        self, images: Tensor, prompts: list[str], metadata: Sequence[Columns] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [B], and of a sum of rewards each one's own [B]."""
        failed = f"failed on {len(images)} images with prompts from {prompts[0]!r} to {prompts[-1]!r}"
        with named_failure(RewardRaised, f"reward {self.reward.name} {failed}"):
            if isinstance(self.reward, WeightedSum):
                parts = self.reward.parts(images, prompts, metadata)
                return self.reward.total(parts, images.device), parts
            return call(self.reward, images, prompts, metadata), {}


def usual_batch(pixels: int, gradients: bool) -> int:
    """Images of so many pixels at once where no GPU's memory says."""
    most, at_once = (GRADIENT_BATCH, GRADIENT_PIXELS) if gradients else (SCORE_BATCH, SCORE_PIXELS)
    return max(1, min(most, at_once // pixels))


def _not_finite(values: Tensor) -> list[int]:
    """Rows of [b, ...] that hold a NaN or an infinity."""
    return torch.nonzero(~values.flatten(1).isfinite().all(1)).flatten().tolist()


def _png(picture: np.ndarray, pixels: int | None = None) -> bytes:
    """A file of [H, W, 3] uint8, made `pixels` square if that is given."""
    image, file = Image.fromarray(picture), io.BytesIO()
    if pixels:
        image = image.resize((pixels, pixels), Image.Resampling.BICUBIC)
    image.save(file, "PNG")
    return file.getvalue()
