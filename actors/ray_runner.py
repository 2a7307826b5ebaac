"""The Ray runner: sampler actors -> reward actors -> learner ranks; only references cross the driver."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from actors.learner_actor import LearnerActor
from actors.pool import Pool
from actors.reward_actor import RewardActor
from actors.sampler_actor import SamplerActor
from cluster.placement import place
from cluster.session import Session
from cluster.waits import get, wait_any
from cluster.weights import WeightStore
from diffusion.trajectory import Chunk, Scores
from learner.config import Config
from learner.runner import EpochResult

POLL_SECONDS = 1.0


class RayRunner:
    """Starts the actors of a run and drives them. See learner/runner.py for the contract."""

    def __init__(self, config: Config) -> None:
        """
        Raises:
            DeadlineExceeded: not all actors were up within run.ready_seconds.
            PlacementError: the cluster's resources do not fit the config.
        """
        self.config = config
        self.session = Session(config.run.cpu_threads)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        config, limit = self.config, self.config.run.ready_seconds
        per_update = config.train.trajectories // config.sampler.chunk_size // config.train.updates_per_epoch
        counts = config.sampler.actors, config.reward.actors, config.learner.ranks
        resources = self.session.resources
        if config.model.device == "cpu":
            resources.pop("GPU", None)
        placement = place(*counts, per_update, resources)
        self.description = f"on Ray: {placement.describe()}"
        shared = ray.put(config)
        samplers = [_spawn(SamplerActor, placement.sampler_options, shared) for _ in range(placement.samplers)]
        scorers = [_spawn(RewardActor, placement.scorer_options, shared) for _ in range(placement.scorers)]
        whole_gpu = placement.rank_options.get("num_gpus") == 1
        self.ranks = [
            _spawn(LearnerActor, placement.rank_options, shared, rank, placement.ranks, whole_gpu)
            for rank in range(placement.ranks)
        ]
        what, deadline = f"starting {placement.describe()} on {resources}", time.monotonic() + limit

        def ready(refs: Any) -> Any:
            return get(refs, max(0.0, deadline - time.monotonic()), what, f"run.ready_seconds={limit:g}")

        address = ready(self.ranks[0].address.remote())
        starts = [rank.start.remote(address, config.run.train_seconds) for rank in self.ranks]
        self.snapshot, self.dimensions = ready(starts)[0]
        ready([actor.ready.remote() for actor in samplers + scorers])
        self.samplers = Pool("sampling", samplers, config.run.chunk_seconds)
        self.scorers = Pool("scoring", scorers, config.run.chunk_seconds)
        self.weights = WeightStore()
        self.weights.publish(self.snapshot)

    def train_epoch(self, epoch: int, beta: float, chunks: Sequence[Chunk]) -> EpochResult:
        scored, rewards, sample_seconds, score_seconds = self._sample_and_score(chunks)
        start = time.perf_counter()
        limit = self.config.run.train_seconds
        calls = [
            actor.train_epoch.remote(epoch, beta, self._share(scored, rank), self.config.run.chunk_seconds)
            for rank, actor in enumerate(self.ranks)
        ]
        metrics, self.snapshot = get(calls, limit, f"training of epoch {epoch}", "run.train_seconds")[0]
        self.weights.publish(self.snapshot)
        return EpochResult(rewards, metrics, sample_seconds, score_seconds, time.perf_counter() - start)

    def evaluate(self, chunks: Sequence[Chunk]) -> list[Scores]:
        scored, _, _, _ = self._sample_and_score(chunks)
        limit = self.config.run.chunk_seconds
        return get([scores for _, scores in scored], limit, "fetching evaluation images", "run.chunk_seconds")

    def save_lora(self, folder: Path) -> None:
        """The files come from rank 0 and are written here: its node need not see the run directory."""
        limit = self.config.run.train_seconds
        files = get(self.ranks[0].lora_files.remote(), limit, "fetching the LoRA files", "run.train_seconds")
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)

    def close(self) -> None:
        self.session.close()

    def _share(self, scored: list[tuple], rank: int) -> list[list[tuple]]:
        """This rank's chunks of each update: every update is the same set of chunks whatever the ranks."""
        updates = self.config.train.updates_per_epoch
        size = len(scored) // updates
        return [scored[i * size : (i + 1) * size][rank :: len(self.ranks)] for i in range(updates)]

    def _sample_and_score(self, chunks: Sequence[Chunk]) -> tuple[list[tuple], list[float], float, float]:
        """(trajectories, scores) references and terminal rewards in chunk order, and the seconds until the last
        chunk was sampled and scored."""
        start = time.perf_counter()
        trajectories: dict[int, ray.ObjectRef] = {}
        scores: dict[int, ray.ObjectRef] = {}
        rewards: dict[int, list[float]] = {}
        sampled_at = start
        for chunk in chunks:
            self.samplers.submit(chunk.index, "sample", chunk, self.weights.ref)
        while self.samplers.busy or self.scorers.busy:
            for index, (trajectory, clean), _receipt in self.samplers.pump():
                trajectories[index] = trajectory
                sampled_at = time.perf_counter()
                self.scorers.submit(index, "score", clean)
            for index, (score,), values in self.scorers.pump():
                scores[index], rewards[index] = score, values
            pending = self.samplers.waiting_on + self.scorers.waiting_on
            if pending:
                wait_any(pending, POLL_SECONDS)
        order = [chunk.index for chunk in chunks]
        pairs = [(trajectories[i], scores[i]) for i in order]
        values = [value for i in order for value in rewards[i]]
        return pairs, values, sampled_at - start, time.perf_counter() - start


def _spawn(shell: type, options: dict[str, float], *arguments: Any) -> Any:
    """Start an actor of a shell class; it lives until the session ends."""
    return ray.remote(shell).options(**options).remote(*arguments)
