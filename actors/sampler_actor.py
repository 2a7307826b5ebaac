"""Ray shell of diffusion.rollout.Sampler."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import ray

from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, CleanPredictions, Receipt, Trajectories

if TYPE_CHECKING:
    from diffusion.rollout import Sampler


class SamplerActor:
    def __init__(self, build: Callable[[], Sampler], shares_gpu: bool) -> None:
        self.sampler, self.shares_gpu = build(), shares_gpu

    def ready(self) -> bool:
        return True

    @ray.method(num_returns=3)
    def sample(self, chunk: Chunk, snapshot: Snapshot) -> tuple[Trajectories, CleanPredictions, Receipt]:
        """Trajectories for the learner, clean predictions for the scorer, and the receipt for the driver."""
        start = time.perf_counter()
        trajectories, clean = self.sampler.sample(chunk, snapshot)
        if self.shares_gpu:
            self.sampler.rest()
        return trajectories, clean, trajectories.receipt(ray.util.get_node_ip_address(), time.perf_counter() - start)
