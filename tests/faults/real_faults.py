"""The faults of emulated_faults.py around the real parts: the embedded model's sampler, scorer and learner."""

from __future__ import annotations

from functools import partial
from typing import Any

from emulated_faults import Fault

from diffusion import lora
from learner import build
from learner.config import Config


class Around:
    """A part with a fault: whatever is not struck is the part's own."""

    def __init__(self, part: Any, fault: Fault, role: str) -> None:
        self.part, self.fault, self.role = part, fault, role
        fault.came(role)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)


class SamplerAround(Around):
    loaded = ""

    def sample(self, chunk, snapshot):
        fault, epoch = self.fault, chunk.epoch if chunk.purpose == "train" else -1
        if fault.here("sampler", "publishing", epoch) and self.loaded != snapshot.sha256:
            half = snapshot.flat.copy()
            half[len(half) // 2 :] = 0
            lora.load(self.part.model.unet, half)
            fault.strike()
        if chunk.index == fault.chunk and fault.role.startswith("rank") and fault.here(fault.role, "idle", epoch):
            fault.strike_the_idle()
        made = self.part.sample(chunk, snapshot)
        self.loaded = snapshot.sha256
        if chunk.index == fault.chunk and fault.here("sampler", "serving", epoch):
            fault.strike()
        return made


class ScorerAround(Around):
    @property
    def batch(self):
        return self.part.batch

    @batch.setter
    def batch(self, size):
        self.part.batch = size

    def score(self, clean):
        scores, epoch = self.part.score(clean), clean.chunk.epoch if clean.chunk.purpose == "train" else -1
        if clean.chunk.index == self.fault.chunk and self.fault.here("scorer", "serving", epoch):
            self.fault.strike()
        return scores


class LearnerAround(Around):
    def __init__(self, part: Any, fault: Fault) -> None:
        super().__init__(part, fault, f"rank {part.rank}")
        self.epoch, real = -1, part._train

        def train(epoch, index, *rest):
            if index > 0 and fault.here(self.role, "serving", epoch):  # the first update has met the other ranks
                fault.strike()
            return real(epoch, index, *rest)

        part._train = train

    def train_epoch(self, epoch, beta, updates):
        others = self.fault.role in ("sampler", "scorer")
        if others and self.part.rank == 0 and self.fault.here(self.fault.role, "idle", epoch):
            self.fault.strike_the_idle()
        return self.part.train_epoch(epoch, beta, updates)

    def publish(self, version):
        fresh = self.part.publish(version)
        if self.fault.here(self.role, "publishing", version - 1):
            self.fault.strike()
        return fresh

    def state_files(self):
        files = self.part.state_files()
        if self.fault.here(self.role, "checkpointing", self.part.published.version - 1):
            self.fault.strike()
        return files


def _sampler(config: Config, fault: Fault) -> Any:
    return SamplerAround(build.build_sampler(config), fault, "sampler")


def _scorer(config: Config, fault: Fault) -> Any:
    return ScorerAround(build.build_scorer(config), fault, "scorer")


def _learner(config: Config, fault: Fault, files: dict[str, bytes] | None) -> Any:
    return LearnerAround(build.build_learner(config, files), fault)


def parts(config: Config, fault: Fault) -> build.Parts:
    """In the place of learner.build.parts."""
    return build.Parts(
        partial(_sampler, config, fault), partial(_scorer, config, fault), partial(_learner, config, fault)
    )
