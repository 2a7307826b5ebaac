"""The Ray runner: samplers -> reward actors -> learner ranks. Only references to what they make cross the driver.

                admit          sample           score               whole           train, publish
    epochs ------------> buffer ------> samplers ------> reward actors ------> buffer ------> learner ranks
    left to do             ^ |                                                                  |     |
                           | '----- newest weights, with each sampling call <-- object store <--'     |
                           '------ closed: one more epoch may be admitted <-- checkpoint written <----'

    who waits                for what                             what ends the wait
    -----------------------  -----------------------------------  ---------------------------------------------------
    an epoch                 train.max_staleness: epochs before   `closed` (the controller, after its checkpoint)
                             it that are not closed
    a chunk in a pool        a sampler or reward actor with room  an answer; run.chunk_seconds: who has it is replaced
    `train_epoch`            every chunk of the epoch, scored     the pools; run.chunk_attempts losses of one: an error
    a learner rank           the other ranks, in a collective     they come; run.train_seconds: all start anew
    `_with_ranks`            the ranks' answers                   they come, or one is lost: all start anew from the
                                                                  last checkpoint; learner.attempts times: an error
    `evaluate`               its chunks, scored                   the pools: they go before training chunks
    a role with too few      a node                               `_follow_nodes` finds one that has joined
    actors

One thread drives it all: whatever is waited for, `_turn` meanwhile hands out work, takes in what is done and replaces
the dead. Which chunk may be sampled when, and what it is behind, is learner/protocol/buffer.py's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from statistics import mean
from typing import Any, TypeVar

import ray

from actors.crew import Crew
from actors.learner_group import LearnerGroup, RanksLost, Shape
from actors.pool import PATIENCE
from actors.rollouts import Rollouts
from actors.shells import LearnerActor
from cluster.nodes import alive_nodes
from cluster.placement import counts_now, place_for
from cluster.readiness import in_group, ready, reserve
from cluster.session import Session
from cluster.waits import DeadlineExceeded, wait_any
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, Scores
from learner import build
from learner.config import Config
from learner.prompts import example_prompt
from learner.protocol.buffer import Buffer, Work
from learner.protocol.ledger import Ledger
from learner.protocol.receipts import StaleWeights
from learner.protocol.runner import EpochResult, Hooks, Training, Vitals
from rewards.registry import Reward

POLL_SECONDS = 0.25
T = TypeVar("T")
NODES_SECONDS = 5.0  # between two looks at which nodes there are


class RayRunner:
    """Starts the actors of a run and drives them. See learner/protocol/runner.py for the contract."""

    def __init__(
        self,
        config: Config,
        files: dict[str, bytes] | None = None,
        hooks: Hooks | None = None,
        name: str = "run",
        own_reward: Reward | None = None,
    ) -> None:
        """`name` is the run's, in the Ray dashboard and on its metrics.

        Raises:
            DeadlineExceeded: not all actors were up within run.ready_seconds.
            PlacementError: the cluster's resources do not fit the config.
            ActorDied: an actor could not start; the message has its error.
        """
        self.config, self.hooks = config, hooks or Hooks()
        self.rollouts: Rollouts | None = None  # from `begin` on
        self._staleness = (0.0, 0)
        self._files: dict[str, bytes] | None = None  # of the checkpoint that is not written yet
        self.session = Session(config.run.cpu_threads)
        self.crew = Crew(config, name, self.hooks.say)
        self.metrics = self.crew.metrics
        try:
            self._start(files, own_reward)
        except RanksLost as lost:
            self.close()
            raise lost.cause from lost
        except BaseException:
            self.close()
            raise

    def _start(self, files: dict[str, bytes] | None, own_reward: Reward | None) -> None:
        config, run = self.config, self.config.run
        self._placement = placement = place_for(config, alive_nodes())
        self._nodes, self._looked = placement.nodes, time.monotonic()
        self.description, self.ranks = f"on Ray: {placement.describe()}", placement.ranks.count
        parts, deadline = build.parts(config, own_reward), time.monotonic() + run.ready_seconds
        self.crew.room = reserve(placement, run.ready_seconds)
        self.crew.start(placement, parts)
        self._build_learner = parts.learner
        shape = Shape(
            placement.ranks.count,
            config.train.updates_per_epoch,
            run.train_seconds,
            run.chunk_seconds,
            run.ready_seconds,
        )
        self._group = LearnerGroup(self._new_rank, shape, self._turn, partial(self.metrics.failed, "learner"))
        self.snapshot, latent = self._group.start(files, deadline)
        self.dimensions = prod(latent)
        self.crew.await_ready(deadline)
        # Memory is measured when every network is in it, one role after the other; ranks train while the others rest.
        share = min(1.0, placement.scorers.gpus or 1.0)
        fitting = self.crew.scorers.ask("fitting_batch", latent, example_prompt(config), config.model.device, share)
        score_batch = min(ready([fitting], deadline, run.ready_seconds)[0])
        share = min(1.0, max(placement.ranks.gpus or 1.0, 1 / self.ranks))
        self.batch_sizes = {"score": score_batch, "micro_batch": self._group.fit_micro_batch(share, deadline)}
        # A restarted group keeps the batches that this one found.
        learner = config.learner.model_copy(update={"micro_batch": self.batch_sizes["micro_batch"]})
        self._build_learner = build.parts(config.model_copy(update={"learner": learner})).learner

    def begin(self, chunks_of: Callable[[int], Sequence[Chunk]], epochs: range, ledger: Ledger) -> None:
        self.ledger = ledger
        self.buffer = Buffer(chunks_of, epochs, self.config.train.max_staleness, ledger)
        self.rollouts = Rollouts(self.crew, self.buffer, self.batch_sizes["score"])
        self.rollouts.publish(self.snapshot)

    def train_epoch(self, epoch: int, beta: float) -> EpochResult:
        """As the contract says.

        Raises:
            StaleWeights: a sampler, or a learner's trajectories, had another adapter than a published one.
            ActorDied, DeadlineExceeded, GroupBroken: learner ranks were lost too often, or no actor could do its work.
        """
        start, rollouts = time.perf_counter(), self._rollouts
        rollouts.submit(self.buffer.admit())
        self._await_epoch(epoch)
        self.hooks.progress("training", 0, 1)
        training_start = time.perf_counter()
        trainings, self.snapshot, self._files = self._with_ranks(partial(self._train, epoch, beta))
        set_aside = [bad for training in trainings for bad in training.set_aside]
        self.ledger.advance(epoch, (bad.trajectory_id for bad in set_aside), "quarantined")
        for training in trainings:
            self.ledger.advance(epoch, training.trajectory_ids, "trained")
        rollouts.publish(self.snapshot)
        accounts = [work.account() for work in self.buffer.take(epoch, epoch)]
        sample_seconds, score_seconds = max(0.0, rollouts.sampled_at - start), training_start - start
        seconds = sample_seconds, score_seconds, time.perf_counter() - training_start
        result = EpochResult(accounts, trainings[0], set_aside, *seconds)
        behind = [epoch - receipt.policy_version for _, receipt, _ in accounts]
        self._staleness = mean(behind), max(behind)
        self.metrics.trained(result)
        return result

    def evaluate(self, chunks: Sequence[Chunk]) -> list[Scores]:
        self.buffer.add(chunks)
        self._rollouts.submit(chunks, first=True)
        scores: dict[int, Scores] = {}
        while True:
            self._pump()
            scores |= {chunk.index: chunk_scores for chunk, chunk_scores in self._rollouts.evaluated()}
            self._with_ranks(self._group.look)
            self.hooks.progress("evaluating", len(scores), len(chunks))
            if len(scores) == len(chunks):
                return [scores[chunk.index] for chunk in chunks]
            self._wait([])

    def checkpoint_files(self) -> dict[str, bytes]:
        if self._files is None:
            self._files = self._with_ranks(self._group.state_files)
        files, self._files = self._files, None
        return files

    def vitals(self) -> Vitals:
        pools = {"sampler": self._rollouts.samplers, "scorer": self._rollouts.scorers}
        actors = {role: len(pool.actors) for role, pool in pools.items()}
        return Vitals(
            self.snapshot.version, self.buffer.in_work, self._staleness, {**actors, "learner": self._group.alive},
            {role: pool.waiting for role, pool in pools.items()}, {role: pool.running for role, pool in pools.items()},
        )  # fmt: skip

    def closed(self, epoch: int) -> None:
        self.buffer.close(epoch)
        self._rollouts.made_again.clear()
        self.metrics.show(self.vitals())

    def close(self) -> None:
        """A Ray of our own ends with us, actors and all; of another's, what is ours is taken away."""
        if ray.is_initialized() and not self.session.own:
            self.crew.dismiss()
        self.session.close()

    @property
    def _rollouts(self) -> Rollouts:
        assert self.rollouts is not None, "begin() comes first"
        return self.rollouts

    def _new_rank(self, rank: int) -> Any:
        assert self.crew.room is not None
        options = in_group(self._placement, self.crew.room)[rank]
        whole_gpu = options.get("num_gpus") == 1
        return self.crew.spawn("learner", LearnerActor, options, self._build_learner, rank, self.ranks, whole_gpu)

    def _train(self, epoch: int, beta: float) -> tuple[list[Training], Snapshot, dict[str, bytes]]:
        """Fetch and train; what turns out to be lost is made again first."""
        works = self._await_epoch(epoch)
        while lost := self._group.fetch(epoch, [(work.trajectories, work.scores) for work in works]):
            self.hooks.say(f"trajectories of {len(lost)} chunks of epoch {epoch} went with their node: made again")
            for place in lost:
                self._rollouts.make_again(works[place].chunk.key)
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
                self.hooks.say(f"{lost}: starting the learner ranks anew from the last checkpoint")

    def _restart_group(self) -> None:
        self._group.stop()
        files = self.hooks.last_checkpoint() if self._files is None else self._files  # those are about to be one
        held, _ = self._group.start(files, time.monotonic() + self.config.run.ready_seconds)
        if held.sha256 != self.snapshot.sha256:
            raise StaleWeights(
                f"the restarted learner holds adapter {held.sha256[:12]} (as version {held.version}), but version "
                f"{self.snapshot.version} is {self.snapshot.sha256[:12]}"
            )

    def _await_epoch(self, epoch: int) -> list[Work]:
        """Take turns until every chunk of the epoch is scored."""
        before = -1
        while True:
            self._pump()
            self._with_ranks(self._group.look)
            works = self.buffer.part("train", epoch)
            done, total = sum(work.verdict is not None for work in works), len(works)
            if done != before:
                self.hooks.progress("sampling and scoring", done, total)
            if done == total:
                return self.buffer.take(epoch, self.snapshot.version)
            before = done
            self._wait([])

    def _turn(self, waiting_on: Sequence[ray.ObjectRef]) -> None:
        """Hand out work and take in what is done, then wait a little for one of these, or for an actor."""
        self._pump()
        self._wait(waiting_on)

    def _wait(self, waiting_on: Sequence[ray.ObjectRef]) -> None:
        if self.rollouts is not None:
            waiting_on = [*waiting_on, *self.rollouts.waiting_on]
        if waiting_on:
            wait_any(waiting_on, POLL_SECONDS)
        else:
            time.sleep(POLL_SECONDS)

    def _pump(self) -> None:
        self.hooks.turn()
        if self.rollouts is None:  # the group starts before there is any other work
            return
        self.rollouts.pump()
        self.metrics.turn(self.vitals)
        if time.monotonic() - self._looked > NODES_SECONDS:
            self._follow_nodes()

    def _follow_nodes(self) -> None:
        """Use nodes that have joined; do without those that have left."""
        self._looked = time.monotonic()
        try:
            nodes = tuple(alive_nodes(PATIENCE))
        except DeadlineExceeded:
            return  # the next call to an actor will say more
        before, now = ({node.id: node for node in each} for each in (self._nodes, nodes))
        if before.keys() == now.keys():
            return
        for verb, these, others in (("joined", now, before), ("left", before, now)):
            for key in these.keys() - others.keys():
                self.hooks.say(f"node {these[key].address} has {verb} the cluster")
        self._nodes = nodes
        samplers, scorers = counts_now(self.config, self._placement, nodes)
        changes = [(self._rollouts.samplers, samplers), (self._rollouts.scorers, scorers)]
        for pool, wanted in sorted(changes, key=lambda change: change[1] - len(change[0].actors)):
            pool.resize(wanted)  # the one that gives room first
