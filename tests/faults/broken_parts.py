"""Emulated parts that are broken for good. As light as those: an actor of these is up in half a second."""

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks.emulated import EmulatedSampler, EmulatedScorer, Emulation


@dataclass(frozen=True)
class Broken(Emulation):
    marks: str = ""  # folder where it leaves a mark, which is the proof that it was struck


class StaleAfterRestart(EmulatedSampler):
    """Dies once, and the one that takes its place keeps the weights it was built with."""

    def __init__(self, emulation):
        super().__init__(emulation)
        self.dies, self.stale = Path(emulation.marks) / "died", Path(emulation.marks) / "stale"
        self.restarted = self.dies.exists()

    def load(self, flat):
        if self.restarted:
            self.stale.touch()
        else:
            super().load(flat)

    def sample(self, chunk, snapshot):
        if (chunk.purpose, chunk.epoch, chunk.index) == ("train", 1, 1) and not self.dies.exists():
            self.dies.touch()
            os._exit(1)
        return super().sample(chunk, snapshot)


class DiesOfChunk1(EmulatedScorer):
    def score(self, clean):
        if clean.chunk.purpose == "train" and clean.chunk.index == 1:
            os._exit(1)
        return super().score(clean)


class SamplingDiesOfChunk1(EmulatedSampler):
    def sample(self, chunk, snapshot):
        if chunk.purpose == "train" and chunk.index == 1:
            os._exit(1)
        return super().sample(chunk, snapshot)


class Unbuildable(EmulatedScorer):
    def __init__(self, emulation):
        raise OSError("the reward's own words: no /no/weights.bin")


class NanForRings:
    def __call__(self, images, prompts):
        scores = images.mean((1, 2, 3))
        scores[[i for i, prompt in enumerate(prompts) if "ring" in prompt]] = float("nan")
        return scores
