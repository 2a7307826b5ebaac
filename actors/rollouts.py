"""Chunks through samplers and reward actors: for training, and for evaluation with or without a learner.

    submitted -> [sampler] -> receipt checked -> [reward actor] -> scored, in the buffer
        ^            |                                |
        '------------+----- lost: made again ---------'

Weights travel with each call, so a chunk is sampled with those that are the newest when a sampler is free for it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial

import ray

from actors.crew import Crew
from cluster.waits import ObjectLost, get, put
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, ChunkKey, Scores
from learner.protocol.buffer import Buffer

SHOWN_PROMPTS = 8


class Rollouts:
    """Not a thread: the owner drives it with `pump`."""

    def __init__(self, crew: Crew, buffer: Buffer, score_batch: int) -> None:
        """Of a crew that is up. `score_batch` images at once in every reward actor."""
        self.buffer, self.score_batch = buffer, score_batch
        self.metrics, self._say, self._run = crew.metrics, crew.say, crew.config.run
        self.samplers = crew.pool(crew.samplers, self._sampling_lost)
        self.scorers = crew.pool(crew.scorers, lambda key: self.metrics.lost("scorer"))
        self.made_again: Counter[ChunkKey] = Counter()
        self.sampled_at = 0.0  # when the last training chunk came from a sampler

    def publish(self, snapshot: Snapshot) -> None:
        """The weights for what no sampler has yet, one object that all samplers read. It is the driver's, so it
        outlives whoever made it; older ones are freed once no call uses them.

        Raises:
            ObjectLost: the object store has no room for it.
        """
        self._ref = put(snapshot, f"publishing policy version {snapshot.version}")
        self._snapshot = snapshot

    def submit(self, chunks: Sequence[Chunk], first: bool = False) -> None:
        """Chunks of the buffer. `first`: before all that waits."""
        for chunk in reversed(chunks) if first else chunks:
            self._sample(chunk.key, first)

    def pump(self) -> None:
        """Hand out what there is room for and take in what is done, without blocking.

        Raises:
            StaleWeights: a sampler had another adapter than it was given.
            ActorDied, DeadlineExceeded, ObjectLost: a chunk was lost run.chunk_attempts times, or no actor is left.
            BadReward: a reward failed.
        """
        for key, (trajectories, clean), receipt in self.samplers.pump():
            with self.metrics.sampled(receipt):
                self.buffer.sampled(key, receipt, trajectories)
            if key.purpose == "train":
                self.sampled_at = time.perf_counter()
            remedy = (
                f"{self._prompts(key)}; leave out the one that ends the reward's process, or have the reward raise an "
                "error for it (reward.on_bad_reward=quarantine sets such trajectories aside)"
            )
            arguments = partial(_arguments, clean, self.score_batch)
            self.scorers.submit(key, "score", arguments, remedy, first=key.purpose == "evaluate")
        for key, (scores,), verdict in self.scorers.pump():
            self.buffer.scored(key, verdict, scores)
            self.metrics.scored(verdict)
        for pool in (self.samplers, self.scorers):  # the weights could not be fetched; a node went with its objects
            while pool.inputs_lost:
                self.make_again(pool.inputs_lost.pop())

    def make_again(self, key: ChunkKey) -> None:
        """What was made of a chunk is gone.

        Raises:
            ObjectLost: for the run.chunk_attempts-th time.
        """
        self.made_again[key] += 1
        self.metrics.lost("object store")
        if (times := self.made_again[key]) >= self._run.chunk_attempts:
            raise ObjectLost(f"{key} was made and lost {times} times (run.chunk_attempts)")
        self.buffer.lose(key)
        self._sample(key, first=True)

    def evaluated(self) -> Iterator[tuple[Chunk, Scores]]:
        """The evaluation's chunks that are scored by now; they leave the buffer."""
        for work in self.buffer.part("evaluate"):
            key = work.chunk.key
            if work.verdict is None:
                continue
            try:
                scores = get(work.scores, self._run.chunk_seconds, f"images of {key}", "run.chunk_seconds")
            except ObjectLost as error:  # with the node of the reward actor that made them
                self._say(f"{error}: will be made again")
                self.make_again(key)
            else:
                del self.buffer.works[key]
                yield work.chunk, scores

    @property
    def waiting_on(self) -> list[ray.ObjectRef]:
        return [*self.samplers.waiting_on, *self.scorers.waiting_on]

    def _sample(self, key: ChunkKey, first: bool) -> None:
        remedy = f"{self._prompts(key)}; a smaller sampler.chunk_size takes less memory"
        self.samplers.submit(key, "sample", partial(self._to_sample, key), remedy, first)

    def _to_sample(self, key: ChunkKey) -> tuple[Chunk, ray.ObjectRef]:
        self.buffer.given(key, self._snapshot)
        return self.buffer.works[key].chunk, self._ref

    def _sampling_lost(self, key: ChunkKey) -> None:
        self.metrics.lost("sampler")
        self.buffer.lose(key)

    def _prompts(self, key: ChunkKey) -> str:
        """Of a chunk, for messages."""
        prompts = list(dict.fromkeys(self.buffer.works[key].chunk.prompts))
        more = f" and {len(prompts) - SHOWN_PROMPTS} more" if len(prompts) > SHOWN_PROMPTS else ""
        return f"its prompts: {', '.join(map(repr, prompts[:SHOWN_PROMPTS]))}{more}"


def _arguments(clean: ray.ObjectRef, batch: int) -> tuple[ray.ObjectRef, int]:
    return clean, batch
