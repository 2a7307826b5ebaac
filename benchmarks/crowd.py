"""The actors' side of benchmarks/scale.py: many emulated samplers in a process, learners that look at what they get.

No torch: a process of these is up in half a second, and takes some 60 MB.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from actors.shells import SamplerActor
from benchmarks.emulated import EmulatedLearner, Emulation, Group, Scored

MOST_LANES = 16


class Lanes(SamplerActor):
    """Several samplers in one process, each a thread of its own, which has one chunk after the other in hand."""

    concurrency_groups: ClassVar = {str(lane): 1 for lane in range(MOST_LANES)}

    def __init__(self, build: Callable[[], Any], shares_gpu: bool) -> None:
        self.build, self.shares_gpu = build, shares_gpu

    @property
    def part(self) -> Any:  # one of its own for every call: an emulated sampler costs nothing to build
        return self.build()


@dataclass(frozen=True, eq=False)
class Lane:
    """One of those, as actors/pool.py sees an actor."""

    host: Any
    number: int

    @property
    def ready(self) -> Any:
        return self.host.ready

    @property
    def sample(self) -> Any:
        return self.host.sample.options(concurrency_group=str(self.number))


class ReadingLearner(EmulatedLearner):
    """Compares every number of a trajectory with what the sampler made it of: what was spilled came back whole."""

    def _train(self, epoch: int, index: int, update: Sequence[Scored]) -> dict[str, float]:
        for made, scores in update:
            value = made.log_pf[:, :1, None, None, None]  # all numbers of a trajectory are this one
            same = (made.states == value).all() and (made.model_output == value).all()
            if not same or not np.array_equal(scores.rewards[:, -1], made.log_pf[:, 0]):
                raise AssertionError(f"{made.chunk.key}: not the numbers that were sampled")
        return super()._train(epoch, index, update)


class ReducingLearner(EmulatedLearner):
    """Averages gradients of `numbers` float32 over the ranks in every update, of which the mean is known exactly."""

    numbers = 0

    def __init__(self, emulation: Emulation, group: Group, files: dict[str, bytes] | None) -> None:
        super().__init__(emulation, group, files)
        self.numbers = emulation.gradients
        self.known_part = np.arange(self.numbers, dtype=np.float32) % 1024

    def _train(self, epoch: int, index: int, update: Sequence[Scored]) -> dict[str, float]:
        import torch
        import torch.distributed as dist

        from learner import process_group

        ranks = dist.get_world_size() if dist.is_initialized() else 1
        parameter: Any = SimpleNamespace(grad=torch.from_numpy(self.known_part + self.rank))
        start = time.perf_counter()
        process_group.average_gradients([parameter])
        seconds = time.perf_counter() - start
        # Exact in float32 where `ranks` is a power of two, whatever the order.
        if not np.array_equal(parameter.grad.numpy(), self.known_part + np.float32((ranks - 1) / 2)):
            raise AssertionError(f"rank {self.rank} of {ranks}: not the mean of the ranks' gradients")
        return {**super()._train(epoch, index, update), "all_reduce_seconds": seconds}


def spawner(real: Callable[..., Any], lanes: int) -> Callable[..., Any]:
    """In the place of Crew.spawn: every `lanes` samplers are one process."""
    if not 1 <= lanes <= MOST_LANES:
        raise ValueError(f"{lanes} samplers a process: 1 to {MOST_LANES}")
    hosts: list[Any] = []
    begun = 0

    def spawn(crew: Any, role: str, shell: type, options: dict[str, Any], *arguments: Any) -> Any:
        nonlocal begun
        if role != "sampler" or lanes == 1:
            return real(crew, role, shell, options, *arguments)
        number, begun = begun % lanes, begun + 1
        if number == 0:
            hosts.append(real(crew, role, Lanes, options, *arguments))
        return Lane(hosts[-1], number)

    return spawn
