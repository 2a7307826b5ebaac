"""Builds the three compute parts from a configuration, the same way in every process."""

import contextlib
import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from pydantic import SecretStr
from torch import nn

from diffusion import lora
from diffusion.base_model import BaseModel, Decoder
from diffusion.open_model import Embed, open_base_model, open_text_encoders
from diffusion.rollout import Sampler
from learner.config import Config, resolve
from learner.update import Learner
from rewards import judges, registry, tokens
from rewards.contract import Reward
from rewards.scorer import Scorer

Embedded = Mapping[str, np.ndarray]  # rows [L, E] float32 by prompt


@dataclass(frozen=True)
class Parts:
    """How to build the compute of a run; each is called in the process that will use it."""

    sampler: Callable[[], Sampler]
    scorer: Callable[[], Scorer]
    learner: Callable[[dict[str, bytes] | None], Learner]  # a checkpoint's files

    def with_embedded(self, embedded: Embedded) -> Self:
        """Sampler and learner have no text encoders: these are the rows of all prompts."""
        without: dict[str, Any] = {
            name: partial(getattr(self, name), embedded=embedded) for name in ("sampler", "learner")
        }
        return replace(self, **without)


def parts(config: Config, reward: Reward | None = None) -> Parts:
    """`reward`: a Python object in place of the one that the config names."""
    judged = config.reward.options, config.evaluation.held_out
    scorer = partial(build_scorer, config, reward, tokens.carried(*judged))
    return Parts(partial(build_sampler, config), scorer, partial(build_learner, config))


def build_text_encoders(config: Config) -> Embed:
    prepare_process(config)
    return open_text_encoders(str(resolve(config.model.path)), device(config), config.model.text_tokens)


def prepare_process(config: Config) -> None:
    """Thread count of this process (results depend on it), and an allocator that keeps its pages."""
    torch.set_num_threads(config.run.cpu_threads)
    with contextlib.suppress(OSError, AttributeError):  # another libc; this saves a third of scoring on a CPU
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def device(config: Config) -> str:
    available = "cuda" if torch.cuda.is_available() else "cpu"
    return available if config.model.device == "auto" else config.model.device


def build_model(config: Config, training: bool = False, embedded: Embedded | None = None) -> BaseModel:
    """The base model with the run's initial adapter: equal in every process. `training`: for a learner."""
    settings = config.model
    place = str(resolve(settings.path)), device(config), getattr(torch, settings.dtype)
    model = open_base_model(*place, settings.pixels, settings.text_tokens, embedded)
    model.attach_lora(
        config.lora.rank, config.lora.alpha or config.lora.rank, config.run.seed, lora.TARGETS[config.lora.targets]
    )
    model.speed_up(settings.channels_last, settings.compile, training and config.learner.gradient_checkpointing)
    return model


def build_sampler(config: Config, embedded: Embedded | None = None) -> Sampler:
    prepare_process(config)
    return Sampler(build_model(config, embedded=embedded), config.rollout_settings())


def build_scorer(
    config: Config, own_reward: Reward | None = None, carried: Mapping[str, SecretStr] | None = None
) -> Scorer:
    """`carried`: tokens of judges behind HTTP, by environment variable."""
    prepare_process(config)
    tokens.put(carried or {})
    where, judge, evaluation = device(config), config.reward, config.evaluation
    reward = own_reward or registry.load(judge.name, judge.weights, where, **judge.options)
    # Gradients in float32: beta multiplies them by up to 1e4.
    dtype = torch.float32 if config.needs.reward_gradients else getattr(torch, config.model.dtype)
    tiny = config.objective.forward_looking_decoder == "tiny"
    return Scorer(
        Decoder(str(resolve(config.model.path)), where, dtype),
        reward,
        config.train.shuffle_rewards,
        config.run.thumbnail_pixels,
        config.needs.reward_gradients,
        Decoder(str(resolve(config.model.tiny_decoder)), where, dtype, tiny=True) if tiny else None,
        judge.batch,
        judge.on_bad_reward == "quarantine",
        judge.black_images == "allow",
        judges.build(evaluation.held_out, evaluation.features, evaluation.clip, where) if evaluation.images else None,
    )


def flow_network(config: Config, latent_shape: tuple[int, int, int], embedding_width: int | None) -> nn.Module | None:
    """The network that the objective trains beside the policy, if there is one."""
    if config.needs.flow is None:
        return None
    from learner.flow import FlowNetwork, GradientNetwork  # here: it imports diffusers, which a driver can do without

    if config.needs.flow == "gradient":
        return GradientNetwork(latent_shape[0], embedding_width, config.flow.widths)
    return FlowNetwork(latent_shape[0], embedding_width, config.flow.widths, config.flow.stem_stride)


def build_learner(config: Config, files: dict[str, bytes] | None = None, embedded: Embedded | None = None) -> Learner:
    """A learner rank; with a process group initialised, one of several. `files` of a checkpoint to go on from."""
    prepare_process(config)
    model = build_model(config, training=True, embedded=embedded)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed + 1)
        flow = flow_network(config, model.latent_shape, model.embedding_width)
    learner = Learner(model, flow, config)
    if files is not None:
        learner.restore(files)
    return learner
