"""Ray shell of learner.update.Learner: one rank of the data-parallel group."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import ray

from cluster.waits import get
from diffusion import lora
from diffusion.lora import Snapshot
from learner import factory, group
from learner.config import Config
from learner.update import Learner

ScoredRefs = tuple[ray.ObjectRef, ray.ObjectRef]


class LearnerActor:
    def __init__(self, config: Config, rank: int, world_size: int, whole_gpu: bool) -> None:
        factory.prepare_process(config)
        self.config, self.rank, self.world_size = config, rank, world_size
        self.whole_gpu = whole_gpu
        self.learner: Learner | None = None

    def address(self) -> str:
        """A free port on this rank's node, where rank 0 will meet the others."""
        return group.free_address(ray.util.get_node_ip_address())

    def start(self, address: str, seconds: float) -> tuple[Snapshot, int]:
        """Join the group and build the networks. Returns policy version 0 and the number of latent dimensions."""
        group.join(address, self.rank, self.world_size, seconds, self.whole_gpu)
        self.learner = factory.build_learner(self.config)
        return self.learner.published, self.learner.dimensions

    def train_epoch(
        self, epoch: int, beta: float, updates: Sequence[Sequence[ScoredRefs]], seconds: float
    ) -> tuple[dict[str, float], Snapshot]:
        """Fetch this rank's share of each update, train, publish the next version."""
        assert self.learner is not None
        refs = [ref for update in updates for pair in update for ref in pair]
        values = iter(get(refs, seconds, f"fetching trajectories of epoch {epoch}", "run.chunk_seconds"))
        fetched = [[(next(values), next(values)) for _ in update] for update in updates]
        metrics = self.learner.train_epoch(epoch, beta, fetched)
        return metrics, self.learner.publish(self.learner.published.version + 1)

    def lora_files(self) -> dict[str, bytes]:
        """The adapter's files, by name."""
        assert self.learner is not None
        with tempfile.TemporaryDirectory() as folder:
            lora.save_files(self.learner.model.unet, Path(folder))
            return {file.name: file.read_bytes() for file in Path(folder).iterdir()}
