"""The rewards of a config, tried before its run (rewards/trial.py) and before its model is loaded."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cluster.deadline import within
from diffusion.failures import ServiceFailed
from diffusion.parts import latent_shape, magnification
from learner.config import Config, resolve
from learner.prompts import evaluation_prompts, metadata_of, training_prompts
from rewards import judges, registry
from rewards.contract import Reward
from rewards.registry import BadReward, CannotBeMade, NoReward, UserReward
from rewards.trial import LEFT_OUT, try_reward
from rewards.weighted_sum import Term, each_term
from rewards.weights import BadWeights

MOST_PIXELS = 2048  # a side


def faults(
    config: Config, own_reward: Callable[..., Any] | None = None, whole: bool = False, path: str | None = None
) -> list[str]:
    """A line for each reward that would end the run; the prompts are known to be sound. Without `whole` those that read
    weights are left out, and faults that learner/api.py's `check` finds, which says all at once. On Ray they are tried
    on the CPU: the driver takes no GPU from an actor. `path`: the model's, where it is not model.path."""
    settings, path = config.reward, path or str(resolve(config.model.path))
    cuda = config.run.runner == "inprocess" and config.model.device != "cpu" and torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    found: list[str] = []

    def attempt(step: Callable[[], Any]) -> None:
        try:
            with within(config.run.chunk_seconds, "trying the rewards", "run.chunk_seconds"):
                step()
        except (BadReward, CannotBeMade) as error:
            found.append(f"{error} ({LEFT_OUT})")
        except (NoReward, BadWeights, ServiceFailed) as error:
            found.append(str(error))
        except ValueError as error:
            if whole:
                found.append(str(error))

    pixels = _side(path, config.model.pixels)
    if pixels is None:
        return found

    def one(load: Callable[[], Reward], prompts: Sequence[str], *asked: Any) -> None:
        try_reward(load(), prompts, metadata_of(prompts), pixels, device, *asked)

    def reward() -> Reward:
        if own_reward:
            return UserReward(settings.name, own_reward)
        return registry.load(settings.name, settings.weights, device, **settings.options)

    def held_out(term: Term) -> None:
        if whole or not registry.reads_weights(term.name):
            one(lambda: term.load(device), evaluation_prompts(config))

    if whole or own_reward or not registry.reads_weights(settings.name, settings.options):
        attempt(lambda: one(reward, training_prompts(config), config.needs.reward_gradients, config.asks_inner_states))
    attempt(lambda: each_term(judges.terms(config.evaluation.held_out), held_out, judges.WHERE))
    return found


def _side(path: str, pixels: int | None) -> int | None:
    """Of the model's pictures; None where its configuration is not sound, which whoever checks it says."""
    try:
        side = int(latent_shape(path, pixels)[1]) * magnification(path)
    except Exception:  # nothing of that configuration has been looked at yet
        return None
    return min(side, MOST_PIXELS) if side > 0 else None
