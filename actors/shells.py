"""Ray's shells around the compute: the sampler, the scorer and the learner in processes of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import ray

from cluster import temp_folders
from cluster.waits import ObjectLost, get
from diffusion.failures import DeadlineExceeded
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, CleanPredictions, Receipt, Scores, Trajectories, Verdict

if TYPE_CHECKING:  # a process imports what it builds alone: emulated parts (benchmarks/emulated.py) need no torch
    import numpy as np

    from diffusion.open_model import Embed
    from diffusion.rollout import Sampler
    from learner.protocol.runner import Training
    from learner.update import Learner, Scored
    from rewards.scorer import Scorer

Build = Callable[["dict[str, bytes] | None"], "Learner"]  # from a checkpoint's files, if there are any
ScoredRefs = tuple[ray.ObjectRef, ray.ObjectRef]  # trajectories, scores


class _Shell:
    def __init__(self, build: Callable[[], Any], shares_gpu: bool) -> None:
        self.part, self.shares_gpu = build(), shares_gpu

    def ready(self) -> bool:
        return True


class SamplerActor(_Shell):
    part: Sampler

    @ray.method(num_returns=3)
    def sample(self, chunk: Chunk, snapshot: Snapshot) -> tuple[Trajectories, CleanPredictions, Receipt]:
        start = time.perf_counter()
        trajectories, clean = self.part.sample(chunk, snapshot)
        if self.shares_gpu:
            self.part.rest()
        return trajectories, clean, trajectories.receipt(ray.util.get_node_ip_address(), time.perf_counter() - start)


class TextActor(_Shell):
    part: Embed  # opens the text encoders at the first call

    def embed(self, prompts: Sequence[str]) -> list[np.ndarray]:
        return list(self.part(prompts))


class RewardActor(_Shell):
    part: Scorer

    def fitting_batch(self, latent: tuple[int, int, int], prompt: str, device: str, share: float) -> int:
        return self.part.batch or self.part.fitting_batch(latent, prompt, device, share)

    @ray.method(num_returns=2)
    def score(self, clean: CleanPredictions, batch: int | None) -> tuple[Scores, Verdict]:
        """For the learner and the driver. `batch` images at once, the same in every actor; None: by their size."""
        start = time.perf_counter()
        self.part.batch = batch
        scores = self.part.score(clean)
        if self.shares_gpu:
            self.part.rest()
        return replace(scores, thumbnails=()), scores.verdict(time.perf_counter() - start)


class LearnerActor:
    """One rank of the data-parallel group. Its networks are built once it has joined the group."""

    concurrency_groups: ClassVar = {"progress": 1}  # a second thread, which answers while the first trains

    def __init__(self, build: Build, rank: int, world_size: int, whole_gpu: bool) -> None:
        self.build, self.rank, self.world_size, self.whole_gpu = build, rank, world_size, whole_gpu
        self.fetched: list[list[Scored]] = []
        self.trained = 0, 1

    def ready(self) -> str:
        """An address where it could meet the others: on its node, or in the folder of a Ray of the run's own."""
        from learner import process_group

        return process_group.free_address(ray.util.get_node_ip_address(), os.environ.get(temp_folders.VARIABLE))

    def start(
        self, address: str, seconds: float, files: dict[str, bytes] | None
    ) -> tuple[Snapshot, tuple[int, int, int]]:
        """Join the group and build the networks. Returns the policy version and the shape of a latent."""
        from learner import process_group

        process_group.join(address, self.rank, self.world_size, seconds, self.whole_gpu)
        self.learner = self.build(files)
        self.learner.tell = self._tell
        return self.learner.published, self.learner.model.latent_shape

    def fit_micro_batch(self, share: float) -> int:
        return self.learner.fit_micro_batch(share)

    def fetch(self, epoch: int, updates: Sequence[Sequence[ScoredRefs]], limit: float) -> list[tuple[int, int]]:
        """Get this rank's share of each update before any rank trains, within `limit` seconds. Returns (update, place)
        of what is lost, and, once something is, of what is not here by then."""
        seconds = limit - min(0.5, limit / 10)  # the group waits for `limit`, and this rank's message says more
        deadline = time.monotonic() + seconds
        what, setting = f"fetching trajectories of epoch {epoch}", f"run.chunk_seconds={limit:g}"
        try:
            values = iter(get([ref for update in updates for pair in update for ref in pair], seconds, what, setting))
        except ObjectLost:
            lost = []
            for i, j, pair in ((i, j, pair) for i, update in enumerate(updates) for j, pair in enumerate(update)):
                try:
                    get(list(pair), max(0.0, deadline - time.monotonic()), what, setting)
                except (ObjectLost, DeadlineExceeded):
                    lost.append((i, j))
            return lost
        self.fetched = [[(next(values), next(values)) for _ in update] for update in updates]
        return []

    def train_epoch(self, epoch: int, beta: float, offset: float) -> tuple[Training, str, Snapshot | None]:
        """Train on what was fetched, and make the next version: its hash, and from rank 0 itself."""
        fetched, self.fetched, self.trained = self.fetched, [], (0, 1)
        training = self.learner.train_epoch(epoch, beta, fetched, offset)
        snapshot = self.learner.publish(self.learner.published.version + 1)
        if not self.whole_gpu:
            self.learner.rest()
        return training, snapshot.sha256, snapshot if self.rank == 0 else None

    def _tell(self, done: int, total: int) -> None:
        self.trained = done, total

    @ray.method(concurrency_group="progress")
    def progress(self) -> tuple[int, int]:
        """Transitions trained and all of the epoch, of this rank; answered while `train_epoch` is at work."""
        return self.trained

    def state_files(self) -> dict[str, bytes]:
        return self.learner.state_files()
