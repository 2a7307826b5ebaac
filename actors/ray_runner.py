"""The Ray runner: sampler actors -> reward actors -> learner ranks; only references cross the driver.

One thread drives it all: whatever is waited for, `_turn` meanwhile hands out work, takes in what is done and replaces
the dead. Which chunk may be sampled when, and what it is behind, is learner/protocol/buffer.py's business.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from statistics import mean
from typing import Any, TypeVar

import ray

from actors.apart import Apart
from actors.crew import Crew
from actors.learner_actor import LearnerActor
from actors.learner_group import LearnerGroup, RanksLost
from actors.metrics import Metrics
from actors.pool import PATIENCE, Limits, Pool
from cluster.nodes import alive_nodes
from cluster.placement import counts_now, place_for
from cluster.readiness import Asked, in_group, ready, reserve
from cluster.session import Session
from cluster.waits import DeadlineExceeded, ObjectLost, get, wait_any
from cluster.weights import WeightStore
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, Scores
from learner import build
from learner.config import Config
from learner.prompts import example_prompt
from learner.protocol.buffer import Key, Pipeline, Work, key_of
from learner.protocol.ledger import Ledger
from learner.protocol.receipts import StaleWeights
from learner.protocol.runner import EpochResult, Hooks, Vitals
from learner.protocol.training import Training
from rewards.registry import Reward

POLL_SECONDS = 0.25
T = TypeVar("T")
NODES_SECONDS = 5.0  # between two looks at which nodes there are


class RayRunner:
    """Starts the actors of a run and drives them. See learner/protocol/runner.py for the contract."""

    def __init__(
        self, config: Config, files: dict[str, bytes] | None = None, name: str = "run", own_reward: Reward | None = None
    ) -> None:
        """`name` is the run's, in the Ray dashboard and on its metrics.

        Raises:
            DeadlineExceeded: not all actors were up within run.ready_seconds.
            PlacementError: the cluster's resources do not fit the config.
            ActorDied: an actor could not start; the message has its error.
        """
        self.config = config
        self.hooks = Hooks()
        self.pipeline: Pipeline | None = None
        self.crew = Crew(name)
        self._staleness = (0.0, 0)
        self._files: dict[str, bytes] | None = None  # of the checkpoint that is not written yet
        self._made_again: Counter[Key] = Counter()
        self._sampled_at = 0.0  # when the last chunk came from a sampler
        self.session = Session(config.run.cpu_threads)
        self.metrics = Metrics(name)
        try:
            self._start(files, own_reward)
        except RanksLost as lost:
            self.close()
            raise lost.cause from lost
        except BaseException:
            self.close()
            raise

    def _start(self, files: dict[str, bytes] | None, own_reward: Reward | None) -> None:
        config, limit = self.config, self.config.run.ready_seconds
        self._placement = placement = place_for(config, alive_nodes())
        self.description, self.ranks = f"on Ray: {placement.describe()}", placement.ranks
        parts = build.parts(config, own_reward)
        new_sampler, new_scorer = self.crew.makers(placement, parts)
        deadline = time.monotonic() + limit
        self.crew.room = reserve(placement, limit)
        samplers = [new_sampler() for _ in range(placement.samplers)]
        scorers = [new_scorer() for _ in range(placement.scorers)]
        self._build_learner = parts.learner
        self._group = LearnerGroup(
            self._new_rank, placement.ranks, config.train.updates_per_epoch, config.run.train_seconds,
            config.run.chunk_seconds, self._turn,
        )  # fmt: skip
        self._group.on_fault = partial(self.metrics.failed, "learner")
        up = [
            Asked("samplers", placement.sampler_options, [actor.ready.remote() for actor in samplers]),
            Asked("reward actors", placement.scorer_options, [actor.ready.remote() for actor in scorers]),
        ]
        what, setting = f"starting {placement.ranks} learner ranks", f"run.ready_seconds={limit:g}"

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        self.snapshot, latent = self._group.start(files, left(), what, setting)
        self.dimensions = prod(latent)
        ready(up, deadline, limit)
        # Memory is measured when every network is in it, one role after the other; ranks train while the others rest.
        prompt, rank_share = example_prompt(config), placement.rank_options.get("num_gpus", 1.0)
        device = config.model.device  # auto is the actor's own: the driver's node may have none
        scorer_share = placement.scorer_options.get("num_gpus", 1.0)
        fitting = [actor.fitting_batch.remote(latent, prompt, device, min(1.0, scorer_share)) for actor in scorers]
        asked = Asked("reward actors", placement.scorer_options, fitting)
        self.batch_sizes = {"score": min(ready([asked], deadline, limit)[0])}
        rank_share = 1.0 if rank_share >= 1 else max(rank_share, 1 / placement.ranks)
        self.batch_sizes["micro_batch"] = self._group.fit_micro_batch(rank_share, left(), what, setting)
        # A restarted group keeps the batches that this one found.
        learner = config.learner.model_copy(update={"micro_batch": self.batch_sizes["micro_batch"]})
        self._build_learner = build.parts(config.model_copy(update={"learner": learner})).learner
        limits = Limits(config.run.chunk_seconds, limit, config.run.chunk_attempts)
        self.samplers = Pool("sampling", samplers, new_sampler, limits, self._say)
        self.scorers = Pool("scoring", scorers, new_scorer, limits, self._say)
        self.samplers.on_lost = self._sampling_lost
        self.scorers.on_hopeless = self._score_apart
        self._apart = Apart(self.scorers, self.batch_sizes["score"])
        self.scorers.on_lost = lambda key: self.metrics.lost("scorer")
        self.samplers.on_fault = partial(self.metrics.failed, "sampler")
        self.scorers.on_fault = partial(self.metrics.failed, "scorer")
        self.weights = WeightStore()
        self.weights.publish(self.snapshot)
        self._nodes, self._looked = placement.nodes, time.monotonic()

    def begin(self, chunks_of: Callable[[int], Sequence[Chunk]], epochs: range, ledger: Ledger) -> None:
        self.pipeline = Pipeline(chunks_of, epochs, self.config.train.max_staleness, ledger)
        self.ledger = ledger

    def train_epoch(self, epoch: int, beta: float) -> EpochResult:
        """As the contract says.

        Raises:
            StaleWeights: a sampler, or a learner's trajectories, had another adapter than a published one.
            ActorDied, DeadlineExceeded, GroupBroken: learner ranks were lost too often, or no actor could do its work.
        """
        start = time.perf_counter()
        for chunk in self._pipeline.admit():
            self.samplers.submit(key_of(chunk), "sample", partial(self._to_sample, key_of(chunk)))
        self._await_epoch(epoch)
        self.hooks.progress("training", 0, 1)
        training_start = time.perf_counter()
        trainings, self.snapshot, self._files = self._with_ranks(partial(self._train, epoch, beta))
        set_aside = [one for training in trainings for one in training.set_aside]
        self.ledger.set_aside(epoch, (one.facts["trajectory_id"] for one in set_aside))
        for training in trainings:
            self.ledger.advance(epoch, training.trajectory_ids, "trained")
        self.weights.publish(self.snapshot)
        works = self._pipeline.take(epoch, epoch)
        sample_seconds, score_seconds = max(0.0, self._sampled_at - start), training_start - start
        seconds = sample_seconds, score_seconds, time.perf_counter() - training_start
        result = EpochResult.of(works, trainings[0], set_aside, *seconds)
        behind = self._pipeline.staleness(epoch)
        self._staleness = mean(behind), max(behind)
        self.metrics.trained(result)
        return result

    def evaluate(self, chunks: Sequence[Chunk]) -> list[Scores]:
        pipeline = self._pipeline
        pipeline.add_evaluation(chunks)
        for chunk in reversed(chunks):
            self.samplers.submit(key_of(chunk), "sample", partial(self._to_sample, key_of(chunk)), first=True)
        while True:
            self._until_whole("evaluate", 0, "evaluating")
            found, lost = [], []
            for work in pipeline.evaluation():
                what = f"evaluation images of chunk {work.chunk.index}"
                try:
                    found.append(get(work.scores, self.config.run.chunk_seconds, what, "run.chunk_seconds"))
                except ObjectLost as error:  # with the node of the reward actor that made them
                    self._say(f"{error}: will be made again")
                    lost.append(key_of(work.chunk))
            if not lost:
                pipeline.take_evaluation()
                return found
            for key in lost:
                self._make_again(key)

    def checkpoint_files(self) -> dict[str, bytes]:
        if self._files is None:
            self._files = self._with_ranks(self._group.state_files)
        files, self._files = self._files, None
        return files

    def vitals(self) -> Vitals:
        pools = {"sampler": self.samplers, "scorer": self.scorers}
        actors = {role: len(pool.actors) for role, pool in pools.items()}
        return Vitals(
            self.snapshot.version, self._pipeline.in_work, self._staleness, {**actors, "learner": self._group.alive},
            {role: pool.waiting for role, pool in pools.items()}, {role: pool.running for role, pool in pools.items()},
        )  # fmt: skip

    def closed(self, epoch: int) -> None:
        self._pipeline.close(epoch)
        self._made_again.clear()
        self.metrics.show(self.vitals())

    def close(self) -> None:
        """A Ray of our own ends with us, actors and all; of another's, what is ours is taken away."""
        if ray.is_initialized() and not self.session.own:
            self.crew.dismiss()
        self.session.close()

    @property
    def _pipeline(self) -> Pipeline:
        assert self.pipeline is not None, "begin() comes first"
        return self.pipeline

    def _say(self, text: str) -> None:
        self.hooks.say(text)

    def _new_rank(self, rank: int) -> Any:
        assert self.crew.room is not None
        options = in_group(self._placement, self.crew.room)[rank]
        whole_gpu = options.get("num_gpus") == 1
        return self.crew.spawn("learner", LearnerActor, options, self._build_learner, rank, self.ranks, whole_gpu)

    def _train(self, epoch: int, beta: float) -> tuple[list[Training], Snapshot, dict[str, bytes]]:
        """Fetch and train; what is found to be lost is made again first."""
        works = self._await_epoch(epoch)
        while lost := self._group.fetch(epoch, [(work.trajectories, work.scores) for work in works]):
            self._say(f"trajectories of {len(lost)} chunks of epoch {epoch} went with their node: made again")
            for place in lost:
                self._make_again(key_of(works[place].chunk))
            works = self._await_epoch(epoch)
        return self._group.train(epoch, beta)

    def _with_ranks(self, work: Callable[[], T]) -> T:
        """Have the learner ranks do something; if they are lost on the way, again from the last checkpoint."""
        attempts = 0
        while True:
            try:
                if attempts:
                    self._restart_group()
                return work()
            except RanksLost as lost:
                attempts += 1
                if attempts >= self.config.learner.attempts:
                    tried = f"(tried {attempts} times, learner.attempts)"
                    raise type(lost.cause)(f"{lost} {tried}") from lost.cause
                self._say(f"{lost}: starting the learner ranks anew from the last checkpoint")

    def _restart_group(self) -> None:
        limit = self.config.run.ready_seconds
        self._group.stop()
        files = self.hooks.last_checkpoint() if self._files is None else self._files  # those are about to be one
        what, setting = "starting the learner ranks anew", f"run.ready_seconds={limit:g}"
        held, _ = self._group.start(files, limit, what, setting)
        if held.sha256 != self.snapshot.sha256:
            raise StaleWeights(
                f"the restarted learner holds adapter {held.sha256[:12]} (as version {held.version}), but version "
                f"{self.snapshot.version} is {self.snapshot.sha256[:12]}"
            )

    def _await_epoch(self, epoch: int) -> list[Work]:
        self._until_whole("train", epoch, "sampling and scoring")
        return self._pipeline.take(epoch, self.snapshot.version)

    def _until_whole(self, purpose: str, epoch: int, doing: str) -> None:
        """Take turns until every chunk of an epoch, or of the evaluation, is scored."""
        before = -1
        while True:
            self._pump()
            self._with_ranks(self._group.look)
            done, total = self._pipeline.counts(purpose, epoch)
            if done != before:
                self.hooks.progress(doing, done, total)
            if done == total:
                return
            before = done
            self._wait([])

    def _turn(self, waiting_on: Sequence[ray.ObjectRef]) -> None:
        """Hand out work and take in what is done, then wait a little for one of these, or for an actor."""
        self._pump()
        self._wait(waiting_on)

    def _wait(self, waiting_on: Sequence[ray.ObjectRef]) -> None:
        if self.pipeline is not None:
            waiting_on = [*waiting_on, *self.samplers.waiting_on, *self.scorers.waiting_on]
        if waiting_on:
            wait_any(waiting_on, POLL_SECONDS)
        else:
            time.sleep(POLL_SECONDS)

    def _pump(self) -> None:
        if (pipeline := self.pipeline) is None:  # the group starts before the pools
            return
        for key, (trajectories, clean), receipt in self.samplers.pump():
            with self.metrics.sampled(receipt):
                pipeline.sampled(key, receipt, trajectories, clean)
            if key[0] == "train":
                self._sampled_at = time.perf_counter()
            self.scorers.submit(key, "score", partial(self._to_score, clean), first=key[0] == "evaluate")
        for key, (scores,), verdict in self.scorers.pump():
            if len(key) > 3:
                self._apart.answered(key, scores)
            else:
                pipeline.scored(key, verdict, scores)
                self.metrics.scored(verdict)
        while self.samplers.inputs_lost:  # the weights could not be fetched
            self._make_again(self.samplers.inputs_lost.pop())
        while self.scorers.inputs_lost:  # a node went, and with it what its samplers had made
            key = self.scorers.inputs_lost.pop()
            if len(key) == 3 or self._apart.lost(key):
                self._make_again(key[:3])
        self.metrics.turn(self.vitals)
        self.hooks.turn()
        if time.monotonic() - self._looked > NODES_SECONDS:
            self._follow_nodes()

    def _follow_nodes(self) -> None:
        """Use nodes that have joined; do without those that have left."""
        self._looked = time.monotonic()
        try:
            nodes = tuple(alive_nodes(PATIENCE))
        except DeadlineExceeded:
            return  # the next call to an actor will say more
        before, now = ({node.id: node for node in found} for found in (self._nodes, nodes))
        if before.keys() == now.keys():
            return
        for verb, one, other in (("joined", now, before), ("left", before, now)):
            for node in (one[key] for key in one.keys() - other.keys()):
                self._say(f"node {node.address} has {verb} the cluster")
        self._nodes = nodes
        samplers, scorers = counts_now(self.config, self._placement, nodes)
        for pool, wanted in sorted(
            ((self.samplers, samplers), (self.scorers, scorers)), key=lambda pair: pair[1] - len(pair[0].actors)
        ):  # the one that gives room first
            pool.resize(wanted)

    def _make_again(self, key: Key) -> None:
        self._made_again[key] += 1
        self.metrics.lost("object store")
        if self._made_again[key] >= self.config.run.chunk_attempts:
            raise ObjectLost(
                f"chunk {key[2]} of epoch {key[1]} was made and lost {self._made_again[key]} times (run.chunk_attempts)"
            )
        self._apart.forget(key)
        self._pipeline.lose(key)
        self.samplers.submit(key, "sample", partial(self._to_sample, key), first=True)

    def _score_apart(self, key: Any, error: Exception) -> bool:
        """Of a chunk that costs every reward actor its process, if bad trajectories are set aside."""
        shuffled = self.config.train.shuffle_rewards and key[0] == "train"
        if self.config.reward.on_bad_reward == "stop" or shuffled:
            return False  # the shuffled rewards of a chunk are its own: it cannot be scored in parts
        if len(key) > 3:
            self._apart.hopeless(key, error)
            return True
        work = self._pipeline.work(key)
        return self._apart.begin(key, len(work.chunk.prompts), work.clean)

    def _sampling_lost(self, key: Key) -> None:
        self.metrics.lost("sampler")
        self._pipeline.lose(key)

    def _to_score(self, clean: ray.ObjectRef) -> tuple[ray.ObjectRef, int]:
        return clean, self.batch_sizes["score"]

    def _to_sample(self, key: Key) -> tuple[Chunk, ray.ObjectRef]:
        """A chunk is sampled with the weights that are the newest when a sampler is free for it."""
        self._pipeline.given(key, self.snapshot)
        return self._pipeline.work(key).chunk, self.weights.ref
