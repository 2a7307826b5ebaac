"""Ray shell of learner.update.Learner: one rank of the data-parallel group."""

from __future__ import annotations

from collections.abc import Sequence

import ray

from cluster.waits import get
from diffusion.lora import Snapshot
from learner import factory, group
from learner.config import Config
from learner.update import Learner, Training

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

    def start(
        self, address: str, seconds: float, files: dict[str, bytes] | None
    ) -> tuple[Snapshot, tuple[int, int, int]]:
        """Join the group and build the networks, from a checkpoint's `files` if there are any. Returns the policy
        version to sample with and the shape of a latent."""
        group.join(address, self.rank, self.world_size, seconds, self.whole_gpu)
        self.learner = factory.build_learner(self.config, files)
        return self.learner.published, self.learner.model.latent_shape

    def fit_micro_batch(self, share: float) -> int:
        """Once all actors have their networks: transitions at once in this rank's share of the free GPU memory."""
        assert self.learner is not None
        return self.learner.fit_micro_batch(share)

    def train_epoch(
        self, epoch: int, beta: float, updates: Sequence[Sequence[ScoredRefs]], seconds: float
    ) -> tuple[Training, str, Snapshot | None]:
        """Fetch this rank's share of each update, train, publish the next version: its hash, and from rank 0 itself."""
        assert self.learner is not None
        refs = [ref for update in updates for pair in update for ref in pair]
        values = iter(get(refs, seconds, f"fetching trajectories of epoch {epoch}", "run.chunk_seconds"))
        fetched = [[(next(values), next(values)) for _ in update] for update in updates]
        training = self.learner.train_epoch(epoch, beta, fetched)
        snapshot = self.learner.publish(self.learner.published.version + 1)
        if not self.whole_gpu:
            self.learner.rest()
        return training, snapshot.sha256, snapshot if self.rank == 0 else None

    def state_files(self) -> dict[str, bytes]:
        """What this rank adds to a checkpoint."""
        assert self.learner is not None
        return self.learner.state_files()
