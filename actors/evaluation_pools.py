"""Sampler and reward actors without a learner: for judging adapters that are finished."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from actors.crew import Crew
from actors.pool import Limits, Pool
from cluster.nodes import alive_nodes
from cluster.placement import place
from cluster.readiness import Asked, ready
from cluster.session import Session
from cluster.waits import ObjectLost, get, put, wait_any
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, Scores
from learner import build
from learner.config import Config
from learner.protocol import receipts
from rewards.scorer import SCORE_BATCH

POLL_SECONDS = 0.25


class EvaluationPools:
    """See evaluation/image_sets.py's Pools."""

    def __init__(self, config: Config, say: Callable[[str], None], name: str = "evaluation") -> None:
        """
        Raises:
            DeadlineExceeded: not all actors were up within run.ready_seconds.
            PlacementError: the cluster's resources do not fit the config.
            ActorDied: an actor could not start; the message has its error.
        """
        self.config, self._say = config, say
        self.crew = Crew(name)
        self.session = Session(config.run.cpu_threads)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        config, limit = self.config, self.config.run.ready_seconds
        placement = place(
            config.sampler.actors, config.reward.actors, 0, 1, alive_nodes(),
            (config.sampler.gpus, config.reward.gpus, None),
            (config.sampler.labels, config.reward.labels, {}), config.run.autoscale,
        )  # fmt: skip
        self.description = f"on Ray: {placement.describe()}"
        new_sampler, new_scorer = self.crew.makers(placement, build.parts(config))
        deadline = time.monotonic() + limit
        samplers = [new_sampler() for _ in range(placement.samplers)]
        scorers = [new_scorer() for _ in range(placement.scorers)]
        up = [
            Asked("samplers", placement.sampler_options, [actor.ready.remote() for actor in samplers]),
            Asked("reward actors", placement.scorer_options, [actor.ready.remote() for actor in scorers]),
        ]
        ready(up, deadline, limit)
        limits = Limits(config.run.chunk_seconds, limit, config.run.chunk_attempts)
        self.samplers = Pool("sampling", samplers, new_sampler, limits, self._say)
        self.scorers = Pool("scoring", scorers, new_scorer, limits, self._say)

    def judge(self, snapshot: Snapshot, chunks: Sequence[Chunk], done: Callable[[Chunk, Scores], None]) -> None:
        """
        Raises:
            StaleWeights: a sampler had another adapter than it was given.
            BadReward: a reward failed.
            ActorDied, DeadlineExceeded, ObjectLost: a chunk was lost run.chunk_attempts times.
        """
        weights = put(snapshot, "sharing an adapter")
        open_chunks = {_key(chunk): chunk for chunk in chunks}
        made_again: Counter[Any] = Counter()

        def sample(key: Any) -> None:
            self.samplers.submit(key, "sample", lambda: (open_chunks[key], weights))

        def again(key: Any, reason: Exception | str) -> None:
            made_again[key] += 1
            if made_again[key] >= self.config.run.chunk_attempts:
                raise ObjectLost(f"chunk {key[2]} was made and lost {made_again[key]} times (run.chunk_attempts)")
            self._say(f"{reason}: will be made again")
            sample(key)

        for key in open_chunks:
            sample(key)
        while open_chunks:
            for key, (_, clean), receipt in self.samplers.pump():
                receipts.check(receipt, snapshot, f"chunk {key[2]} of the evaluation")
                self.scorers.submit(key, "score", partial(self._to_score, clean))
            for key, (scores,), _ in self.scorers.pump():
                what = f"images of chunk {key[2]}"
                try:
                    found = get(scores, self.config.run.chunk_seconds, what, "run.chunk_seconds")
                except ObjectLost as error:
                    again(key, error)
                else:
                    done(open_chunks.pop(key), found)
            for pool in (self.samplers, self.scorers):
                while pool.inputs_lost:
                    key = pool.inputs_lost.pop()
                    again(key, f"what chunk {key[2]} needs is gone")
            wait_any([*self.samplers.waiting_on, *self.scorers.waiting_on], POLL_SECONDS)

    def close(self) -> None:
        """A Ray of our own ends with us, actors and all; of another's, what is ours is taken away."""
        if not self.session.own:
            self.crew.dismiss()
        self.session.close()

    def _to_score(self, clean: Any) -> tuple[Any, int]:
        # Not what free memory holds: the same figures everywhere. A chunk is mostly smaller.
        return clean, self.config.reward.batch or SCORE_BATCH


def _key(chunk: Chunk) -> tuple[str, int, int]:
    return chunk.purpose, chunk.epoch, chunk.index
