"""Memory by role, counted on torch's meta device: of parameters exactly, of activations the bytes alive at once when
one sample goes through. What a GPU adds is not in it: the allocator's rounding, CUDA's context, libraries' workspaces.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from commands.networks import Networks, passes_of
from diffusion import lora
from learner import embeddings
from learner.config import Config
from learner.update import MOST
from reports.summary import plural

FLOAT = 4  # bytes
# Parameters of the reward models at their published sizes, all float32; others: unknown.
REWARDS = {
    "aesthetic": 304_894_177, "clip_score": 427_616_513, "hpsv2": 986_109_441, "imagereward": 446_206_689,
    "jpeg_compressibility": 0, "jpeg_incompressibility": 0, "pickscore": 986_109_441,
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    encoders: int  # of text, float32
    embedding: int  # of a prompt, float32
    network: int  # in model.dtype, without the LoRA
    lora: int  # float32
    flow: int  # network, float32
    decoders: int
    forward: int  # most alive in a pass without gradients, one sample
    train: int  # most alive forward and back, one sample; without the parameters' gradients
    flow_train: int  # the same of the flow network, one state
    decode: int  # most alive in decoding one image, and back where the reward's gradient is used
    reward: int | None  # model; None: unknown


class Alive(TorchDispatchMode):
    """Bytes alive of what is computed within, and the most of them. What it is computed from is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._seen.update(_storages((args, kwargs)))  # what is new here was there before
        results = func(*args, **(kwargs or {}))
        for storage in _storages(results):
            if storage not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return results

    def _freed(self, count: int) -> None:
        self.now -= count


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attention in one kernel, as on GPUs: the meta device's own makes the matrix of all pairs of tokens."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def peak(forward: Callable[[], torch.Tensor], backward: bool = False) -> int:
    """The most bytes alive at once of what `forward` makes, its output among them, and with `backward` of the way back.
    Gradients of parameters are not counted where they are there already."""
    one_kernel = mock.patch.object(F, "scaled_dot_product_attention", _fused)  # a mode would not reach recomputations
    with one_kernel, Alive() as alive, torch.set_grad_enabled(backward):
        output = forward()
        if backward:
            output.sum().backward()
    return alive.most


def size(module: nn.Module | None) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers())) if module is not None else 0


def count(config: Config, parts: Networks) -> Memory:
    adapter = sum(p.nbytes for _, p in lora.named(parts.unet))
    trained = [*(p for _, p in lora.named(parts.unet)), *(parts.flow.parameters() if parts.flow else ())]
    for parameter in trained:  # counted by themselves
        parameter.grad = torch.zeros_like(parameter)
    rows, width = parts.embedding
    numbers = REWARDS.get(config.reward.name)
    return Memory(
        encoders=sum(map(size, parts.encoders.values())),
        embedding=FLOAT * rows * width,
        network=size(parts.unet) - adapter,
        lora=adapter,
        flow=size(parts.flow),
        decoders=size(parts.vae) + size(parts.tiny),
        forward=peak(parts.output),
        train=peak(parts.output, backward=True),
        flow_train=peak(parts.log_flow, backward=True) if parts.flow else 0,
        decode=peak(lambda: parts.vae.decode(parts.latents).sample, parts.latents.requires_grad) if parts.vae else 0,
        reward=None if numbers is None else FLOAT * numbers,
    )


def lines(config: Config, held: Memory) -> list[str]:
    """A line a role."""
    passes, micro = passes_of(config), config.learner.micro_batch or 1
    twice = ", twice for guidance" if passes == 2 else ""
    once, encoded = held.encoders >= FLOAT * embeddings.LARGE, []
    network = {"text encoders": held.encoders * (not once), f"network in {config.model.dtype}": held.network}
    network["LoRA"] = held.lora
    if once:
        prompts = len(embeddings.prompts(config))
        encoded = [
            f"text encoders (once, before training): {_gb(held.encoders)} in float32; the embeddings of "
            f"{plural(prompts, 'prompt')} go through the object store: {_gb(prompts * held.embedding)}"
        ]
    chunk = config.sampler.chunk_size
    sampler = network | {f"{chunk} samples forward{twice}": chunk * passes * held.forward}
    flow = 2 * held.flow_train  # at both ends of a transition
    joint = 0 if config.flow.fit_steps else flow  # the policy's loss trains it, too
    steps = {f"{plural(micro, 'transition')} forward and back{twice}": micro * (passes * held.train + joint)}
    if config.flow.fit_steps or config.flow.warmup_steps:
        steps[f"{config.flow.batch} transitions in a flow-only step"] = config.flow.batch * flow
    most = max(steps, key=lambda name: steps[name])  # one is done after the other
    moments = 0 if config.learner.optimizer == "natural" else 2 * held.lora
    learner = network | {"its gradient": held.lora, "its moments": moments, "flow network with its own": 4 * held.flow}
    learner[most] = steps[most]
    actor = {"decoder": held.decoders, config.reward.name: held.reward, "decoding an image": held.decode}
    free = "" if config.learner.micro_batch else f"; micro-batches are what free memory holds, {MOST} at most"
    unknown = "" if held.reward is not None else f"; {config.reward.name}'s own size is not known"
    return [
        *encoded,
        _sum("sampler", sampler),
        _sum("learner rank", learner) + free,
        _sum("reward actor", actor) + unknown,
        "not counted: trajectories, reward models at work, and what a GPU adds: allocator, context, workspaces",
    ]


def _sum(role: str, parts: Mapping[str, int | None]) -> str:
    there = {name: value for name, value in parts.items() if value}
    return f"{role}: {_gb(sum(there.values()))} = " + " + ".join(
        f"{name} {_gb(value)}" for name, value in there.items()
    )


def _gb(value: int) -> str:
    return f"{value / 1e9:.3g} GB"
