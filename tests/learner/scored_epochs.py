"""Epochs of scored trajectories, made on the spot, for tests of the learner."""

import torch

from diffusion.snapshot import Snapshot
from learner import build
from learner.config import Config
from learner.experience import Experience
from learner.objectives.base import Transitions
from learner.prompts import read_prompts
from learner.protocol.chunks import training_chunks
from learner.update import Learner


def scored_epoch(config: Config, snapshot: Snapshot):
    sampler, scorer = build.build_sampler(config), build.build_scorer(config)
    pairs = []
    for chunk in training_chunks(config, read_prompts(config.prompts.path), 0):
        trajectories, clean = sampler.sample(chunk, snapshot)
        pairs.append((trajectories, scorer.score(clean)))
    return pairs


def stir(learner: Learner) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*learner.policy_parameters, *learner.flow_parameters]:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def micro_batches(learner: Learner, epoch) -> list[Transitions]:
    return [batch for scored in epoch for batch in learner._micro_batches(Experience(*scored), 5.0)]
