"""Ray shell of learner.update.Learner: one rank of the data-parallel group."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import ray

from cluster.waits import DeadlineExceeded, ObjectLost, get
from diffusion.snapshot import Snapshot
from learner import process_group
from learner.protocol.training import Training

if TYPE_CHECKING:
    from learner.update import Learner, Scored

ScoredRefs = tuple[ray.ObjectRef, ray.ObjectRef]
Build = Callable[["dict[str, bytes] | None"], "Learner"]


class LearnerActor:
    def __init__(self, build: Build, rank: int, world_size: int, whole_gpu: bool) -> None:
        self.build, self.rank, self.world_size, self.whole_gpu = build, rank, world_size, whole_gpu
        self.learner: Learner | None = None
        self.fetched: list[list[Scored]] = []

    def ready(self) -> bool:
        return True

    def address(self) -> str:
        """A free port on this rank's node, where rank 0 will meet the others."""
        return process_group.free_address(ray.util.get_node_ip_address())

    def start(
        self, address: str, seconds: float, files: dict[str, bytes] | None
    ) -> tuple[Snapshot, tuple[int, int, int]]:
        """Join the group and build the networks, from a checkpoint's `files` if there are any. Returns the policy
        version to sample with and the shape of a latent."""
        process_group.join(address, self.rank, self.world_size, seconds, self.whole_gpu)
        self.learner = self.build(files)
        return self.learner.published, self.learner.model.latent_shape

    def fit_micro_batch(self, share: float) -> int:
        """Once all actors have their networks: transitions at once in this rank's share of the free GPU memory."""
        assert self.learner is not None
        return self.learner.fit_micro_batch(share)

    def fetch(self, epoch: int, updates: Sequence[Sequence[ScoredRefs]], limit: float) -> list[tuple[int, int]]:
        """Get this rank's share of each update before any rank trains, within `limit` seconds. Returns (update, place)
        of what is lost, and, once something is, of what is not here by then."""
        seconds = limit - min(0.5, limit / 10)  # the group waits for `limit`, and this rank's words are better
        deadline = time.monotonic() + seconds
        refs = [ref for update in updates for pair in update for ref in pair]
        what, setting = f"fetching trajectories of epoch {epoch}", f"run.chunk_seconds={limit:g}"
        try:
            values = iter(get(refs, seconds, what, setting))
        except ObjectLost:
            lost = []
            for i, update in enumerate(updates):
                for j, pair in enumerate(update):
                    try:
                        get(list(pair), max(0.0, deadline - time.monotonic()), what, setting)
                    except (ObjectLost, DeadlineExceeded):
                        lost.append((i, j))
            return lost
        self.fetched = [[(next(values), next(values)) for _ in update] for update in updates]
        return []

    def train_epoch(self, epoch: int, beta: float) -> tuple[Training, str, Snapshot | None]:
        """Train on what was fetched, and make the next version: its hash, and from rank 0 itself."""
        assert self.learner is not None
        fetched, self.fetched = self.fetched, []
        training = self.learner.train_epoch(epoch, beta, fetched)
        snapshot = self.learner.publish(self.learner.published.version + 1)
        if not self.whole_gpu:
            self.learner.rest()
        return training, snapshot.sha256, snapshot if self.rank == 0 else None

    def state_files(self) -> dict[str, bytes]:
        """What this rank adds to a checkpoint."""
        assert self.learner is not None
        return self.learner.state_files()
