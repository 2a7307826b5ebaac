"""Epochs of scored trajectories, made on the spot, for tests of the learner."""

import functools

import torch

from diffusion.snapshot import Snapshot
from learner import build
from learner.config import Config
from learner.config.sections import FlowConfig, LearnerConfig
from learner.experience import Experience
from learner.objectives.base import Transitions
from learner.prompts import read_prompts
from learner.protocol.chunks import training_chunks
from learner.update import Learner

_epochs: dict[tuple, list] = {}  # scored, by config and snapshot


@functools.cache
def _compute(config: str):
    """Sampler and scorer of a config in JSON."""
    parsed = Config.model_validate_json(config)
    return build.build_sampler(parsed), build.build_scorer(parsed)


def scored_epoch(config: Config, snapshot: Snapshot, epoch: int = 0):
    """An epoch's chunks, sampled by this snapshot. Configs that differ in their learners alone share them."""
    plain = config.model_copy(update={"learner": LearnerConfig(), "flow": FlowConfig()}).model_dump_json()
    key = plain, snapshot.version, snapshot.sha256, epoch
    if key not in _epochs:
        sampler, scorer = _compute(plain)
        chunks = training_chunks(config, read_prompts(config.prompts.path), epoch)
        sampled = [sampler.sample(chunk, snapshot) for chunk in chunks]
        _epochs[key] = [(trajectories, scorer.score(clean)) for trajectories, clean in sampled]
    return list(_epochs[key])


def stir(learner: Learner) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*learner.policy_parameters, *learner.flow_parameters]:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def micro_batches(learner: Learner, epoch) -> list[Transitions]:
    return [batch for scored in epoch for batch in learner._micro_batches(Experience(*scored), 5.0)]
