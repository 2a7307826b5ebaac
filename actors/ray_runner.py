"""The Ray runner: samplers -> reward actors -> learner ranks. Only references to what they make cross the driver.

                admit          sample           score               whole           train, publish
    epochs ------------> buffer ------> samplers ------> reward actors ------> buffer ------> learner ranks
    left to do             ^ |                                                                  |     |
                           | '----- newest weights, with each sampling call <-- object store <--'     |
                           '------ closed: one more epoch may be admitted <-- checkpoint written <----'

Who waits for what is said in learner/controller.py. Every wait here ends with an answer or at its deadline: a chunk's
(run.chunk_seconds), and who has it is replaced, run.chunk_attempts times; the learner ranks' (run.train_seconds), and
all start anew from the last checkpoint, learner.attempts times. When a node joins, a role that is short gets actors.

One thread drives it all: whatever is waited for, `_turn` meanwhile hands out work, takes in what is done and replaces
the dead. Which chunk may be sampled when, and what it is behind, is learner/protocol/buffer.py's business."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from statistics import mean
from typing import Any

import ray

from actors import texts
from actors.crew import Crew
from actors.learner_group import LearnerGroup, RanksLost
from actors.pool import PATIENCE
from actors.rollouts import Rollouts
from cluster.nodes import alive_nodes
from cluster.placement import counts_now
from diffusion.failures import DeadlineExceeded
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, Scores
from learner import build
from learner.config import Config
from learner.protocol import receipts
from learner.protocol.buffer import Buffer, Work
from learner.protocol.ledger import Ledger
from learner.protocol.runner import EpochResult, Hooks, Training, Vitals
from rewards.contract import Reward

NODES_SECONDS = 5.0  # between two looks at which nodes there are


class RayRunner:
    """Starts the actors of a run and drives them. See learner/protocol/runner.py for the contract."""

    def __init__(
        self, config: Config, files: dict[str, bytes] | None = None, hooks: Hooks | None = None, name: str = "run",
        own_reward: Reward | None = None,
    ) -> None:  # fmt: skip
        """`name` is the run's, for Ray. Raises DeadlineExceeded, PlacementError or ActorDied if it cannot start."""
        self.config, self.hooks = config, hooks or Hooks()
        self.crew = Crew(config, name, self.hooks.say)
        self.close = self.crew.close
        self._begun, self._staleness = False, (0.0, 0)
        self._files: dict[str, bytes] | None = None  # of the checkpoint that is not written yet
        try:
            self._start(files, own_reward)
        except BaseException as error:
            self.close()
            if isinstance(error, RanksLost):
                raise error.args[0] from error
            raise

    def _start(self, files: dict[str, bytes] | None, own_reward: Reward | None) -> None:
        config, crew = self.config, self.crew
        self._with_texts = texts.prepare(crew, partial(self.hooks.progress, texts.WHAT))
        parts = self._with_texts(build.parts(config, own_reward))
        crew.place()
        self.description, self.ranks = crew.description, crew.placement.ranks.count
        self._nodes, self._looked = crew.placement.nodes, time.monotonic()
        deadline = time.monotonic() + config.run.ready_seconds
        self.rollouts = Rollouts(crew, parts)
        self._group = LearnerGroup(crew, parts.learner, self._turn, partial(self.hooks.progress, "training"))
        self.hooks.progress("starting the learner ranks", 0, self.ranks)
        self.snapshot, latent = self._group.start(files, deadline)
        self.dimensions = prod(latent)
        # Memory is measured when every network is in it, one role after the other; ranks train while the others rest.
        self.rollouts.await_ready(deadline, latent, partial(self.hooks.progress, "starting samplers and reward actors"))
        micro_batch = self._group.fit_micro_batch(deadline)
        assert self.rollouts.score_batch is not None  # it was asked for
        self.batch_sizes = {"score": self.rollouts.score_batch, "micro_batch": micro_batch}
        # A restarted group keeps the batches that this one found.
        learner = config.learner.model_copy(update={"micro_batch": micro_batch})
        self._group.build = self._with_texts(build.parts(config.model_copy(update={"learner": learner}))).learner

    def begin(self, chunks_of: Callable[[int], Sequence[Chunk]], epochs: range, ledger: Ledger) -> None:
        self.ledger, self._begun = ledger, True
        self.buffer = self.rollouts.buffer = Buffer(chunks_of, epochs, self.config.train.max_staleness, ledger)
        self.rollouts.publish(self.snapshot)

    def train_epoch(self, epoch: int, beta: float, offset: float) -> EpochResult:
        """As the contract says. Raises what Rollouts.pump does and, if learner ranks were lost too often, why."""
        start = time.perf_counter()
        for chunk in self.buffer.admit():
            self.rollouts.samplers.submit(chunk.key)
        self._await_epoch(epoch)
        scored = time.perf_counter()
        trainings, self.snapshot, self._files = self._with_ranks(partial(self._train, epoch, beta, offset))
        set_aside = [bad for training in trainings for bad in training.set_aside]
        self.ledger.advance(epoch, (bad.trajectory_id for bad in set_aside), "quarantined")
        self.ledger.advance(epoch, (it for training in trainings for it in training.trajectory_ids), "trained")
        self.rollouts.publish(self.snapshot)
        seconds = max(0.0, self.rollouts.sampled_at - start), scored - start, time.perf_counter() - scored
        accounts = [work.account() for work in self.buffer.take(epoch, epoch)]
        behind = [epoch - receipt.policy_version for _, receipt, _ in accounts]
        self._staleness = mean(behind), max(behind)
        result = EpochResult(accounts, trainings[0], set_aside, *seconds)
        self.crew.metrics.trained(result)
        return result

    def evaluate(self, chunks: Sequence[Chunk]) -> list[Scores]:
        scores: dict[int, Scores] = {}

        def done(chunk: Chunk, chunk_scores: Scores) -> None:
            scores[chunk.index] = chunk_scores
            self.hooks.progress("evaluating", len(scores), len(chunks))

        self.hooks.progress("evaluating", 0, len(chunks))
        self.rollouts.evaluate(chunks, done, self._pump_and_look)
        return [scores[chunk.index] for chunk in chunks]

    def checkpoint_files(self) -> dict[str, bytes]:
        files, self._files = self._files, None
        return files or self._with_ranks(self._group.state_files)

    def vitals(self) -> Vitals:
        pools = self.rollouts.pools
        actors = {role: len(pool.calls) for role, pool in pools.items()} | {"learner": len(self._group.actors)}
        waiting, running = ({role: pool.load()[i] for role, pool in pools.items()} for i in range(2))
        return Vitals(self.snapshot.version, self.buffer.in_work, self._staleness, actors, waiting, running)

    def closed(self, epoch: int) -> None:
        self.buffer.close(epoch)
        self.rollouts.made_again.clear()
        self.crew.metrics.show(self.vitals())

    def _train(self, epoch: int, beta: float, offset: float) -> tuple[list[Training], Snapshot, dict[str, bytes]]:
        """Fetch and train; what turns out to be lost is made again first."""
        while True:
            works = self._await_epoch(epoch)
            lost = self._group.fetch(epoch, [(work.trajectories, work.scores) for work in works])
            if not lost:
                return self._group.train(epoch, beta, offset)
            self.hooks.say(f"trajectories of {len(lost)} chunks of epoch {epoch} went with their node: made again")
            for place in lost:
                self.rollouts.make_again(works[place].chunk.key)

    def _with_ranks(self, work: Callable[[], Any]) -> Any:
        """Have the learner ranks do something; if they are lost on the way, again from the last checkpoint."""
        attempts = 0
        while True:
            try:
                if attempts:  # the files of an epoch that is not closed are about to be the last checkpoint
                    files = self._files or self.hooks.last_checkpoint()
                    held, _ = self._group.start(files, time.monotonic() + self.config.run.ready_seconds)
                    receipts.check_ranks([self.snapshot.sha256, held.sha256])
                return work()
            except RanksLost as lost:
                attempts, (cause,) = attempts + 1, lost.args
                if attempts >= self.config.learner.attempts:
                    raise type(cause)(f"{cause} (tried {attempts} times, learner.attempts)") from cause
                self.crew.failed("learner", cause, "starting the learner ranks anew from the last checkpoint")

    def _await_epoch(self, epoch: int) -> list[Work]:
        """Take turns until every chunk of the epoch is scored."""
        while True:
            self._pump_and_look()
            works = self.buffer.part("train", epoch)
            scored, total = sum(work.verdict is not None for work in works), len(works)
            self.hooks.progress("sampling and scoring", scored, total)
            if scored == total:
                return self.buffer.take(epoch, self.snapshot.version)
            self.rollouts.pause()

    def _pump_and_look(self) -> None:
        self._pump()
        self._with_ranks(self._group.look)

    def _turn(self, waiting_on: Sequence[ray.ObjectRef]) -> None:
        """Wait a little for one of these, or for an actor; then take in what is done, and hand out work."""
        self.rollouts.pause(waiting_on)
        self._pump()

    def _pump(self) -> None:
        self.hooks.turn()
        if self._begun:  # the group starts before there is any other work
            self.rollouts.pump()
            self.crew.metrics.turn(self.vitals)
            if time.monotonic() - self._looked > NODES_SECONDS:
                self._follow_nodes()

    def _follow_nodes(self) -> None:
        """Use nodes that have joined; do without those that have left."""
        self._looked = time.monotonic()
        try:
            nodes = tuple(alive_nodes(PATIENCE))
        except DeadlineExceeded:
            return  # the next call to an actor will say more
        before, now = ({node.id: node.address for node in each} for each in (self._nodes, nodes))
        if before.keys() == now.keys():
            return
        for key in before.keys() ^ now.keys():
            self.hooks.say(f"node {(before | now)[key]} has {'joined' if key in now else 'left'} the cluster")
        self._nodes = nodes
        wanted = zip(self.rollouts.pools.values(), counts_now(self.config, self.crew.placement, nodes), strict=True)
        for pool, count in sorted(wanted, key=lambda change: change[1] - len(change[0].calls)):
            pool.resize(count)  # the one that gives room first
