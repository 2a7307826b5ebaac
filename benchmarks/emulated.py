"""Sampler, scorer and learner that compute next to nothing, and take as long as they are told: what is left of a run
is the protocol. For measuring it, and for breaking it often in little time.

Numpy alone: an actor of these is up in half a second. Everything depends on what it would really depend on (a
trajectory on its weights, its noise key and nothing else; an update on all its trajectories), in arithmetic that is
exact in any order, so that a run is bitwise the same whatever the ranks.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from diffusion.snapshot import Snapshot, digest
from diffusion.trajectory import Chunk, CleanPredictions, Scores, Trajectories
from learner.protocol import receipts
from learner.protocol.runner import Training

Scored = tuple[Trajectories, Scores]
STATE = "learner.json"
DECIDED = 3  # the state that settles a reward
SCALE = 2**20  # rewards are whole multiples of 1 / SCALE


@dataclass(frozen=True)
class Emulation:
    """Sizes and seconds. The defaults are small; FULL_SIZE is Stable Diffusion 1.5's latents in 50 steps."""

    latent: tuple[int, int, int] = (1, 2, 2)
    steps: int = 2
    parameters: int = 64
    max_staleness: int = 0
    sample_seconds: float = 0.0  # a chunk
    score_seconds: float = 0.0  # a chunk
    train_seconds: float = 0.0  # an epoch
    gradients: int = 0  # numbers that an update averages over the ranks (benchmarks/crowd.py)


FULL_SIZE = Emulation(latent=(4, 64, 64), steps=50, parameters=797_184)  # LoRA of rank 4 on the attention projections


class EmulatedSampler:
    """Every latent of a trajectory is one number, made of its key and the weights."""

    def __init__(self, emulation: Emulation) -> None:
        self.emulation = emulation
        self.flat = np.zeros(emulation.parameters, np.float32)

    def sample(self, chunk: Chunk, snapshot: Snapshot) -> tuple[Trajectories, CleanPredictions]:
        self.load(snapshot.flat)
        time.sleep(self.emulation.sample_seconds)
        steps, latent = self.emulation.steps, self.emulation.latent
        batch, loaded = len(chunk.prompts), digest(self.flat)
        values = np.array([self._value(chunk, i, loaded) for i in range(batch)], np.float32)
        states = np.empty((batch, steps + 1, *latent), np.float32)
        states[:] = values.reshape(-1, *[1] * (states.ndim - 1))
        row, step = (part.ravel() for part in np.indices((batch, steps + 1)))
        trajectories = Trajectories(
            chunk, snapshot.version, loaded, np.arange(steps, 0, -1), states, states[:, :-1, 0, 0, 0].copy(),
            states[:, 1:, 0, 0, 0].copy(), np.tile(np.arange(steps), (batch, 1)), states[:, :-1].copy(),
        )  # fmt: skip
        return trajectories, CleanPredictions(chunk, steps, states.reshape(-1, *latent).copy(), row, step, steps)

    model = None  # nothing to lend

    def load(self, flat: np.ndarray) -> None:
        self.flat = np.array(flat)

    def rest(self) -> None: ...

    @staticmethod
    def _value(chunk: Chunk, i: int, loaded: str) -> float:
        number = chunk.noise_ids(DECIDED)[i]
        key = f"{chunk.purpose} {chunk.seed} {chunk.epoch} {number} {chunk.prompts[i]} {loaded}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:2], "big") / 2**16


class EmulatedScorer:
    """The reward of a state is its first number."""

    def __init__(self, emulation: Emulation) -> None:
        self.emulation, self.batch = emulation, 8

    def fitting_batch(self, latent: tuple[int, int, int], prompt: str, device: str, share: float = 1.0) -> int:
        return self.batch

    def score(self, clean: CleanPredictions) -> Scores:
        time.sleep(self.emulation.score_seconds)
        clean.latents.sum()  # all of it is read, as decoding would
        rewards = np.full((len(clean.chunk.prompts), clean.num_steps + 1), np.nan, np.float32)
        rewards[clean.row, clean.step] = clean.latents[:, 0, 0, 0]
        if clean.chunk.purpose == "train":
            return Scores(clean.chunk, rewards)
        shade = (rewards[:, -1] * 255).astype(np.uint8)
        return Scores(clean.chunk, rewards, images=np.tile(shade[:, None, None, None], (1, 8, 8, 3)))

    def rest(self) -> None: ...


class Group(Protocol):
    """Adds up whole numbers over the ranks."""

    rank: int

    def sum(self, numbers: np.ndarray) -> np.ndarray: ...


class Alone:
    rank = 0

    def sum(self, numbers: np.ndarray) -> np.ndarray:
        return numbers


class Gloo:
    """torch.distributed's group, which the actor has joined.

    Raises:
        GroupBroken: a peer is gone or silent.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank = dist.get_rank()

    def sum(self, numbers: np.ndarray) -> np.ndarray:
        from learner import process_group

        return np.sum(process_group.gather(numbers), axis=0)


class EmulatedLearner:
    """An update adds the sum of its trajectories' rewards to parameters that remember all updates before."""

    def __init__(self, emulation: Emulation, group: Group, files: dict[str, bytes] | None) -> None:
        self.emulation, self.group, self.rank = emulation, group, group.rank
        self.model = SimpleNamespace(latent_shape=emulation.latent, borrow=lambda lender: None)
        self.dimensions = int(np.prod(emulation.latent))
        blank = {"version": 0, "momentum": [0] * emulation.parameters, "known": []}
        saved: dict[str, Any] = json.loads(files[STATE]) if files else blank
        self.momentum = np.array(saved["momentum"], np.int64)
        self.published = self._snapshot(saved["version"])
        # The versions whose trajectories may be trained on.
        self.known = [tuple(one) for one in saved["known"]] or [(0, self.published.sha256)]

    def fit_micro_batch(self, share: float = 1.0) -> int:
        return 1

    def train_epoch(self, epoch: int, beta: float, updates: Sequence[Sequence[Scored]], offset: float) -> Training:
        time.sleep(self.emulation.train_seconds)
        rows = [self._train(epoch, index, update) for index, update in enumerate(updates)]
        ids = tuple(number for update in updates for made, _ in update for number in made.chunk.trajectory_ids)
        return Training({"loss": sum(row["loss"] for row in rows)}, rows, ids)

    def _train(self, epoch: int, index: int, update: Sequence[Scored]) -> dict[str, float]:
        for made, _ in update:
            if (made.policy_version, made.adapter_sha256) not in self.known:
                raise receipts.StaleWeights(f"chunk {made.chunk.index} of epoch {epoch} is of no known version")
            made.states.sum(), made.model_output.sum()  # all of it is read, as training would
        rewards = sum(int((scores.rewards[:, -1].astype(np.float64) * SCALE).sum()) for _, scores in update)
        total = int(self.group.sum(np.array([rewards], np.int64))[0])
        places = np.arange(len(self.momentum)) + 7 * index + 1
        self.momentum = np.roll(self.momentum, 1) + places * (total % 65_521 + 1) % (2**40)
        return {"loss": total / SCALE}

    def publish(self, version: int) -> Snapshot:
        fresh = self._snapshot(version)
        receipts.check_moved(self.published, fresh)
        self.published = fresh
        self.known = [*self.known, (version, fresh.sha256)][-1 - self.emulation.max_staleness :]
        return fresh

    def _snapshot(self, version: int) -> Snapshot:
        flat = (self.momentum % SCALE / SCALE).astype(np.float32)
        return Snapshot(version, flat, digest(flat))

    def rest(self) -> None: ...

    def state_files(self) -> dict[str, bytes]:
        if self.group.rank:
            return {f"rank-{self.group.rank}.txt": b"here\n"}
        state = {"version": self.published.version, "momentum": self.momentum.tolist(), "known": self.known}
        return {STATE: json.dumps(state).encode(), "lora/flat.bin": self.published.flat.tobytes()}


def learner_group() -> Group:
    """Whatever group this process has joined."""
    dist = sys.modules.get("torch.distributed")
    joined = dist is not None and dist.is_available() and dist.is_initialized()
    return Gloo() if joined else Alone()


def build_learner(
    emulation: Emulation, files: dict[str, bytes] | None, kind: type[EmulatedLearner] = EmulatedLearner
) -> EmulatedLearner:
    """A rank."""
    return kind(emulation, learner_group(), files)


def parts(emulation: Emulation, kind: type[EmulatedLearner] = EmulatedLearner) -> Any:
    """In the place of learner.build.parts."""
    from learner.build import Parts

    sampler: Any = partial(EmulatedSampler, emulation)
    scorer: Any = partial(EmulatedScorer, emulation)
    learner: Any = partial(build_learner, emulation, kind=kind)
    return Parts(sampler, scorer, learner)
