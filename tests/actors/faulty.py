"""Actors that fail in one way each, on cue: what test_faults.py injects. Config.run.dir is where they leave a mark."""

import os
from pathlib import Path

import ray

from actors.shells import RewardActor, SamplerActor
from diffusion import rollout
from learner.config import Config


def first_time(config: Config, name: str) -> bool:
    """True once over all processes: the mark left behind is the proof that the fault fired."""
    try:
        Path(config.run.dir).with_name(name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class SkipsLoad(SamplerActor):
    """New weights come, and are never copied into the module."""

    def __init__(self, build, shares_gpu):
        super().__init__(build, shares_gpu)
        rollout.lora.load = lambda unet, flat: None


class DiesOnce(SamplerActor):
    """Its process is gone in the middle of epoch 1's chunk 1."""

    def __init__(self, build, shares_gpu):
        super().__init__(build, shares_gpu)
        self.config = build.args[0]

    @ray.method(num_returns=3)
    def sample(self, chunk, snapshot):
        if chunk.purpose == "train" and (chunk.epoch, chunk.index) == (1, 1) and first_time(self.config, "died"):
            os._exit(1)
        return super().sample(chunk, snapshot)


class ScorerDiesOnce(RewardActor):
    def __init__(self, build, shares_gpu):
        super().__init__(build, shares_gpu)
        self.config = build.args[0]

    @ray.method(num_returns=2)
    def score(self, clean, batch):
        if clean.chunk.purpose == "train" and clean.chunk.epoch == 1 and first_time(self.config, "scorer-died"):
            os._exit(1)
        return super().score(clean, batch)


class Raises:
    """A user's reward that fails."""

    def __call__(self, images, prompts):
        raise RuntimeError("the reward's own words")


class NanForRings:
    def __call__(self, images, prompts):
        scores = images.mean((1, 2, 3))
        scores[[i for i, prompt in enumerate(prompts) if "ring" in prompt]] = float("nan")
        return scores
