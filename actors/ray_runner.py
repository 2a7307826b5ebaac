"""The Ray runner: sampler actors -> reward actors -> learner ranks; only references cross the driver."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from actors.learner_actor import LearnerActor
from actors.pool import Limits, Pool
from actors.reward_actor import RewardActor
from actors.sampler_actor import SamplerActor
from cluster.nodes import alive_nodes
from cluster.placement import place_for
from cluster.readiness import Asked, in_group, ready, reserve
from cluster.session import Session
from cluster.waits import ObjectLost, get, put, wait_any
from cluster.weights import WeightStore
from diffusion.trajectory import Chunk, Receipt, Scores, Verdict
from learner import receipts
from learner.config import Config
from learner.ledger import Ledger
from learner.prompts import example_prompt
from learner.runner import EpochResult, Hooks

POLL_SECONDS = 1.0


class RayRunner:
    """Starts the actors of a run and drives them. See learner/runner.py for the contract."""

    def __init__(self, config: Config, files: dict[str, bytes] | None = None) -> None:
        """
        Raises:
            DeadlineExceeded: not all actors were up within run.ready_seconds.
            PlacementError: the cluster's resources do not fit the config.
            ActorDied: an actor could not start; the message has its error.
        """
        self.config = config
        self.hooks = Hooks()
        self._spawned: list[Any] = []
        self._group: PlacementGroup | None = None
        self.session = Session(config.run.cpu_threads)
        try:
            self._start(files)
        except BaseException:
            self.close()
            raise

    def _start(self, files: dict[str, bytes] | None) -> None:
        config, limit = self.config, self.config.run.ready_seconds
        placement = place_for(config, alive_nodes())
        self.description, self.ranks = f"on Ray: {placement.describe()}", placement.ranks
        shared, state = put(config, "sharing the config"), put(files, "sharing the checkpoint")
        share = placement.scorer_options.get("num_gpus", 1.0)
        shares_gpu = share % 1 > 0 or placement.sampler_options.get("num_gpus", 1.0) % 1 > 0
        new_sampler = partial(self._spawn, SamplerActor, placement.sampler_options, shared, shares_gpu)
        new_scorer = partial(self._spawn, RewardActor, placement.scorer_options, shared, shares_gpu)
        deadline = time.monotonic() + limit
        self._group = reserve(placement, limit)
        samplers = [new_sampler() for _ in range(placement.samplers)]
        scorers = [new_scorer() for _ in range(placement.scorers)]
        whole_gpu = placement.rank_options.get("num_gpus") == 1
        self._ranks = [
            self._spawn(LearnerActor, options, shared, rank, placement.ranks, whole_gpu)
            for rank, options in enumerate(in_group(placement, self._group))
        ]
        up = [
            Asked("samplers", placement.sampler_options, [actor.ready.remote() for actor in samplers]),
            Asked("reward actors", placement.scorer_options, [actor.ready.remote() for actor in scorers]),
        ]

        def answers(role: str, options: dict[str, Any], refs: list[Any]) -> list[Any]:
            return ready([Asked(role, options, refs)], deadline, limit)[0]

        on_ranks = partial(answers, "learner ranks", placement.rank_options)
        (address,) = on_ranks([self._ranks[0].address.remote()])
        starts = [rank.start.remote(address, config.run.train_seconds, state) for rank in self._ranks]
        self.snapshot, latent = on_ranks(starts)[0]
        self.dimensions = prod(latent)
        ready(up, deadline, limit)
        # Memory is measured when every network is in it, one role after the other; ranks train while the others rest.
        prompt, rank_share = example_prompt(config), placement.rank_options.get("num_gpus", 1.0)
        fitting = [actor.fitting_batch.remote(latent, prompt, min(1.0, share)) for actor in scorers]
        self.batch_sizes = {"score": min(answers("reward actors", placement.scorer_options, fitting))}
        rank_share = 1.0 if rank_share >= 1 else max(rank_share, 1 / placement.ranks)
        fitting = [rank.fit_micro_batch.remote(rank_share) for rank in self._ranks]
        self.batch_sizes["micro_batch"] = min(on_ranks(fitting))
        limits = Limits(config.run.chunk_seconds, limit, config.run.chunk_attempts)
        self.samplers = Pool("sampling", samplers, new_sampler, limits, self._say)
        self.scorers = Pool("scoring", scorers, new_scorer, limits, self._say)
        self.weights = WeightStore()
        self.weights.publish(self.snapshot)

    def train_epoch(self, epoch: int, beta: float, chunks: Sequence[Chunk], ledger: Ledger) -> EpochResult:
        """As the contract says.

        Raises:
            StaleWeights: a sampler, or a learner's trajectories, had another adapter than the published one.
            ActorDied, DeadlineExceeded: a learner rank is gone, or work could not be done by any actor.
        """
        pairs, accounts, sample_seconds, score_seconds = self._sample_and_score(chunks, ledger)
        start = time.perf_counter()
        limit = self.config.run.train_seconds
        self.hooks.progress("training", 0, 1)
        calls = [
            actor.train_epoch.remote(epoch, beta, self._share(pairs, rank), self.config.run.chunk_seconds)
            for rank, actor in enumerate(self._ranks)
        ]
        answers = get(calls, limit, f"training of epoch {epoch}", "run.train_seconds")
        receipts.check_ranks([sha256 for _, sha256, _ in answers])
        for training, _, _ in answers:
            ledger.advance(training.trajectory_ids, "trained")
        training, _, self.snapshot = answers[0]
        self.weights.publish(self.snapshot)
        return EpochResult(
            chunks,
            [receipt for receipt, _ in accounts],
            [verdict for _, verdict in accounts],
            training,
            sample_seconds,
            score_seconds,
            time.perf_counter() - start,
        )

    def evaluate(self, chunks: Sequence[Chunk]) -> list[Scores]:
        pairs, _, _, _ = self._sample_and_score(chunks, None)
        limit = self.config.run.chunk_seconds
        return get([scores for _, scores in pairs], limit, "fetching evaluation images", "run.chunk_seconds")

    def checkpoint_files(self) -> dict[str, bytes]:
        """They come from the ranks and are written by the driver: the ranks' nodes need not see the run directory."""
        limit = self.config.run.train_seconds
        parts = get([rank.state_files.remote() for rank in self._ranks], limit, "a checkpoint", "run.train_seconds")
        return {name: content for part in parts for name, content in part.items()}

    def close(self) -> None:
        if ray.is_initialized():
            for actor in self._spawned:
                ray.kill(actor)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        self._spawned, self._group = [], None
        self.session.close()

    def _say(self, text: str) -> None:
        self.hooks.say(text)

    def _spawn(self, shell: type, options: dict[str, Any], *arguments: Any) -> Any:
        """Start an actor of a shell class; it lives until `close`."""
        actor = ray.remote(shell).options(**options).remote(*arguments)
        self._spawned.append(actor)
        return actor

    def _share(self, scored: list[tuple], rank: int) -> list[list[tuple]]:
        """This rank's chunks of each update: every update is the same set of chunks whatever the ranks."""
        updates = self.config.train.updates_per_epoch
        size = len(scored) // updates
        return [scored[i * size : (i + 1) * size][rank :: len(self._ranks)] for i in range(updates)]

    def _sample_and_score(
        self, chunks: Sequence[Chunk], ledger: Ledger | None
    ) -> tuple[list[tuple], list[tuple[Receipt, Verdict]], float, float]:
        """(trajectories, scores) references, and the actors' accounts, in chunk order; the seconds until the last
        chunk was sampled and scored. Evaluation has no ledger: nothing is trained on it."""
        by_index = {chunk.index: chunk for chunk in chunks}
        start = sampled_at = time.perf_counter()
        trajectories: dict[int, ray.ObjectRef] = {}
        scores: dict[int, ray.ObjectRef] = {}
        accounts: dict[int, tuple[Receipt, Verdict]] = {}
        sampled: dict[int, Receipt] = {}

        def enter(index: int, stage: str) -> None:
            if ledger:
                ledger.advance(by_index[index].trajectory_ids, stage)

        def lose(index: int) -> None:
            if ledger:
                ledger.lose(by_index[index].trajectory_ids)

        self.samplers.on_lost = lose
        for pool in (self.samplers, self.scorers):
            pool.begin()
        made_again: Counter[int] = Counter()
        for chunk in chunks:
            self.samplers.submit(chunk.index, "sample", chunk, self.weights.ref)
        while self.samplers.busy or self.scorers.busy:
            for index, (trajectory, clean), receipt in self.samplers.pump():
                receipts.check(receipt, self.snapshot, f"chunk {index} of {by_index[index].where}")
                enter(index, "sampled")
                trajectories[index], sampled[index] = trajectory, receipt
                sampled_at = time.perf_counter()
                self.scorers.submit(index, "score", clean, self.batch_sizes["score"])
            for index, (score,), verdict in self.scorers.pump():
                enter(index, "scored")
                scores[index], accounts[index] = score, (sampled[index], verdict)
                self.hooks.progress("sampling and scoring", len(scores), len(chunks))
            while self.scorers.inputs_lost:  # a node went, and with it what its samplers had made
                index = self.scorers.inputs_lost.pop()
                made_again[index] += 1
                if made_again[index] >= self.config.run.chunk_attempts:
                    raise ObjectLost(
                        f"chunk {index} was sampled and lost {made_again[index]} times (run.chunk_attempts)"
                    )
                lose(index)
                self.samplers.submit(index, "sample", by_index[index], self.weights.ref)
            wait_any(self.samplers.waiting_on + self.scorers.waiting_on, POLL_SECONDS)
        order = [chunk.index for chunk in chunks]
        pairs = [(trajectories[i], scores[i]) for i in order]
        return pairs, [accounts[i] for i in order], sampled_at - start, time.perf_counter() - start
