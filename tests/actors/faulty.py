"""Parts that fail in one way each, on cue: what test_faults.py and test_evaluation_pools.py inject."""

import os
from pathlib import Path

import ray

from actors.shells import RewardActor, SamplerActor
from benchmarks.emulated import EmulatedSampler, Emulation


def first_time(mark: Path) -> bool:
    """True once over all processes: the mark left behind is the proof that the fault fired."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def strike(build, name: str, chunk, chunks=(0, 1)) -> None:
    """The process is gone, once, in the middle of one of epoch 1's chunks. The mark is beside the run's folder."""
    struck = (chunk.purpose, chunk.epoch) == ("train", 1) and chunk.index in chunks
    if struck and first_time(Path(build.args[0].run.dir).with_name(name)):
        os._exit(1)


class DiesOnce(SamplerActor):
    def __init__(self, build, shares_gpu):
        super().__init__(build, shares_gpu)
        self.build = build

    @ray.method(num_returns=3)
    def sample(self, chunk, snapshot):
        strike(self.build, "died", chunk, chunks=(1,))
        return super().sample(chunk, snapshot)


class ScorerDiesOnce(RewardActor):
    def __init__(self, build, shares_gpu):
        super().__init__(build, shares_gpu)
        self.build = build

    @ray.method(num_returns=2)
    def score(self, clean, batch):
        strike(self.build, "scorer-died", clean.chunk)
        return super().score(clean, batch)


class EmulatedDiesOnce(EmulatedSampler):
    """At chunk 1."""

    def __init__(self, mark: Path) -> None:
        super().__init__(Emulation())
        self.mark = mark

    def sample(self, chunk, snapshot):
        if chunk.index == 1 and first_time(self.mark):
            os._exit(1)
        return super().sample(chunk, snapshot)


class NanForRings:
    def __call__(self, images, prompts):
        scores = images.mean((1, 2, 3))
        scores[[i for i, prompt in enumerate(prompts) if "ring" in prompt]] = float("nan")
        return scores
