"""Chunks through samplers and reward actors: for training, and for evaluation with or without a learner.

    submitted -> [sampler] -> receipt checked -> [reward actor] -> scored, in the buffer
        ^            |                                |
        '------------+----- lost: made again ---------'

Weights travel with each call, so a chunk is sampled with those that are the newest when a sampler is free for it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import ray

from actors.crew import Crew
from actors.pool import Pool
from actors.shells import RewardActor, SamplerActor
from cluster.readiness import Asked, ready
from cluster.waits import ObjectLost, get, put, wait_any
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, ChunkKey, Scores
from learner import build
from learner.build import Parts
from learner.config import Config
from learner.prompts import example_prompt
from learner.protocol.buffer import Buffer
from learner.protocol.ledger import Ledger
from learner.protocol.receipts import StaleWeights
from rewards.scorer import SCORE_BATCH

POLL_SECONDS = 0.25
SHOWN_PROMPTS = 8
REMEDIES = {
    "sampler": "a smaller sampler.chunk_size takes less memory",
    "scorer": "leave out the one that ends the reward's process, or have the reward raise an error for it "
    "(reward.on_bad_reward=quarantine sets such trajectories aside)",
}


class Rollouts:
    """Not a thread: the owner drives it with `pump`."""

    def __init__(self, crew: Crew, parts: Parts) -> None:
        """Starts the actors, where the crew has placed them; they are up after `await_ready`."""
        self.crew, self.config = crew, crew.config
        self.buffer = Buffer(lambda epoch: [], range(0), 0, Ledger())  # without a learner nothing is trained
        # Not what free memory holds, if nobody asks for that: the same figures everywhere. A chunk is mostly smaller.
        self.score_batch = self.config.reward.batch or SCORE_BATCH
        self.made_again: Counter[ChunkKey] = Counter()
        self.sampled_at = 0.0  # when the last training chunk came from a sampler
        self.pools: dict[str, Pool] = {}
        shares = crew.placement.samplers, crew.placement.scorers
        shares_gpu = any(share.gpus % 1 > 0 for share in shares)
        for role, doing, share, shell, part, call in (
            ("sampler", "sampling", shares[0], SamplerActor, parts.sampler, self._sample),
            ("scorer", "scoring", shares[1], RewardActor, parts.scorer, self._score),
        ):
            spawn = partial(crew.spawn, role, shell, share.spread, part, shares_gpu)
            hears = partial(crew.failed, role), partial(self._lost, role), partial(self._remedy, role)
            self.pools[role] = Pool(doing, share.count, spawn, call, self.config, *hears)
        self.samplers, self.scorers = self.pools.values()

    def await_ready(self, deadline: float) -> None:
        """Until all actors are up. `deadline` is of time.monotonic.

        Raises:
            DeadlineExceeded: they are not; says who is missing, and what the cluster has.
            ActorDied: an actor could not start; the message has its error.
        """
        ready([self._ask("sampler", "ready"), self._ask("scorer", "ready")], deadline, self.config.run.ready_seconds)

    def fit_score_batch(self, latent: tuple[int, int, int], deadline: float) -> int:
        """Images at once that every reward actor's share of its free GPU memory holds: what they score from now on."""
        share = min(1.0, self.crew.placement.scorers.gpus or 1.0)
        arguments = latent, example_prompt(self.config), self.config.model.device, share
        asked = self._ask("scorer", "fitting_batch", *arguments)
        self.score_batch = min(ready([asked], deadline, self.config.run.ready_seconds)[0])
        return self.score_batch

    def _ask(self, role: str, method: str, *arguments: Any) -> Asked:
        calls = [getattr(actor, method).remote(*arguments) for actor in self.pools[role].actors]
        return Asked(f"{role}s", getattr(self.crew.placement, f"{role}s"), calls)

    def publish(self, snapshot: Snapshot) -> None:
        """The weights for what no sampler has yet, one object that all samplers read. It is the driver's, so it
        outlives whoever made it; older ones are freed once no call uses them.

        Raises:
            ObjectLost: the object store has no room for it.
        """
        self._ref = put(snapshot, f"publishing policy version {snapshot.version}")
        self._snapshot = snapshot

    def submit(self, chunks: Sequence[Chunk]) -> None:
        """Chunks of the buffer, behind all that wait."""
        for chunk in chunks:
            self.samplers.submit(chunk.key)

    def evaluate(self, chunks: Sequence[Chunk]) -> None:
        """Before all that wait; `evaluated` gives them back."""
        self.buffer.add_evaluation(chunks)
        for chunk in reversed(chunks):
            self.samplers.submit(chunk.key, first=True)

    def pump(self) -> None:
        """Hand out what there is room for and take in what is done, without blocking.

        Raises:
            StaleWeights: a sampler had another adapter than it was given.
            ActorDied, DeadlineExceeded, ObjectLost: a chunk was lost run.chunk_attempts times, or no actor is left.
            BadReward: a reward failed.
        """
        metrics = self.crew.metrics
        for key, (trajectories, clean), receipt in self.samplers.pump():
            try:
                self.buffer.sampled(key, receipt, trajectories, clean)
            except StaleWeights as error:
                metrics.record("receipts", 1, outcome="failed")
                self.crew.failed("sampler", error)
                raise
            metrics.sampled(receipt)
            if key.purpose == "train":
                self.sampled_at = time.perf_counter()
            self.scorers.submit(key, first=key.purpose == "evaluate")
        for key, (scores,), verdict in self.scorers.pump():
            self.buffer.scored(key, verdict, scores)
            metrics.scored(verdict)
        for pool in self.pools.values():  # the weights could not be fetched; a node went with its objects
            while pool.inputs_lost:
                self.make_again(pool.inputs_lost.pop())

    def make_again(self, key: ChunkKey) -> None:
        """What was made of a chunk is gone.

        Raises:
            ObjectLost: for the run.chunk_attempts-th time.
        """
        self.made_again[key] += 1
        self._lost("object store", key)
        if (times := self.made_again[key]) >= self.config.run.chunk_attempts:
            raise ObjectLost(f"{key} was made and lost {times} times (run.chunk_attempts)")
        self.samplers.submit(key, first=True)

    def evaluated(self) -> Iterator[tuple[Chunk, Scores]]:
        """The evaluation's chunks that are scored by now; they leave the buffer."""
        for work in self.buffer.evaluated():
            key = work.chunk.key
            try:
                scores = get(work.scores, self.config.run.chunk_seconds, f"images of {key}", "run.chunk_seconds")
            except ObjectLost as error:  # with the node of the reward actor that made them
                self.crew.say(f"{error}: will be made again")
                self.make_again(key)
            else:
                self.buffer.drop(key)
                yield work.chunk, scores

    def wait(self, also: Sequence[ray.ObjectRef] = ()) -> None:
        """A little, for an actor's answer or one of these."""
        refs = [*also, *(ref for pool in self.pools.values() for ref in pool.waiting_on)]
        if refs:
            wait_any(refs, POLL_SECONDS)
        else:
            time.sleep(POLL_SECONDS)

    def resize(self, samplers: int, scorers: int) -> None:
        """As many actors as there is room for now."""
        changes = [(self.samplers, samplers), (self.scorers, scorers)]
        for pool, wanted in sorted(changes, key=lambda change: change[1] - len(change[0].actors)):
            pool.resize(wanted)  # the one that gives room first

    def _sample(self, sampler: Any, key: ChunkKey) -> list[ray.ObjectRef]:
        self.buffer.given(key, self._snapshot)
        return sampler.sample.remote(self.buffer.work(key).chunk, self._ref)

    def _score(self, scorer: Any, key: ChunkKey) -> list[ray.ObjectRef]:
        return scorer.score.remote(self.buffer.work(key).clean, self.score_batch)

    def _lost(self, where: str, key: ChunkKey) -> None:
        """A chunk was lost with an actor, or what was made of it with the object store."""
        self.crew.metrics.record("lost_chunks", 1, where=where)
        if where != "scorer":  # the next one gets the clean predictions once more
            self.buffer.lose(key)

    def _remedy(self, role: str, key: ChunkKey) -> str:
        """Against a chunk that costs every actor of the role its process."""
        prompts = list(dict.fromkeys(self.buffer.work(key).chunk.prompts))
        more = f" and {len(prompts) - SHOWN_PROMPTS} more" if len(prompts) > SHOWN_PROMPTS else ""
        return f"its prompts: {', '.join(map(repr, prompts[:SHOWN_PROMPTS]))}{more}; {REMEDIES[role]}"


class EvaluationPools:
    """Samplers and reward actors without a learner: see evaluation/image_sets.py's Pools."""

    def __init__(self, config: Config, say: Callable[[str], None], name: str = "evaluation") -> None:
        """
        Raises:
            DeadlineExceeded, PlacementError, ActorDied: as Crew.place and Rollouts.await_ready do.
        """
        self.crew = Crew(config, name, say)
        try:
            self.crew.place(learner=False)
            self.description = self.crew.description
            self.rollouts = Rollouts(self.crew, build.parts(config))
            self.rollouts.await_ready(time.monotonic() + config.run.ready_seconds)
        except BaseException:
            self.close()
            raise

    def judge(self, snapshot: Snapshot, chunks: Sequence[Chunk], done: Callable[[Chunk, Scores], None]) -> None:
        """As the protocol says.

        Raises:
            StaleWeights, BadReward, ActorDied, DeadlineExceeded, ObjectLost: as Rollouts.pump does.
        """
        self.rollouts.publish(snapshot)
        self.rollouts.made_again.clear()
        self.rollouts.evaluate(chunks)
        left = len(chunks)
        while left:
            self.rollouts.pump()
            for chunk, scores in self.rollouts.evaluated():
                left -= 1
                done(chunk, scores)
            self.rollouts.wait()

    def close(self) -> None:
        self.crew.close()
