"""Samplers and reward actors without a learner: for judging adapters that are finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from actors.crew import Crew
from actors.rollouts import Rollouts
from cluster.nodes import alive_nodes
from cluster.placement import place_for
from cluster.session import Session
from cluster.waits import wait_any
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, Scores
from learner import build
from learner.config import Config
from learner.protocol.buffer import Buffer
from learner.protocol.ledger import Ledger
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
        self.session = Session(config.run.cpu_threads)
        self.crew = Crew(config, name, say)
        try:
            placement = place_for(config, alive_nodes(), learner=False)
            self.description = f"on Ray: {placement.describe()}"
            deadline = time.monotonic() + config.run.ready_seconds
            self.crew.start(placement, build.parts(config))
            self.crew.await_ready(deadline)
        except BaseException:
            self.close()
            raise
        nothing_to_train = Buffer(lambda epoch: [], range(0), 0, Ledger())
        # Not the batch that free memory holds: the same figures everywhere. A chunk is mostly smaller.
        self.rollouts = Rollouts(self.crew, nothing_to_train, config.reward.batch or SCORE_BATCH)

    def judge(self, snapshot: Snapshot, chunks: Sequence[Chunk], done: Callable[[Chunk, Scores], None]) -> None:
        """As the protocol says.

        Raises:
            StaleWeights, BadReward, ActorDied, DeadlineExceeded, ObjectLost: as Rollouts.pump does.
        """
        self.rollouts.publish(snapshot)
        self.rollouts.made_again.clear()
        self.rollouts.buffer.add(chunks)
        self.rollouts.submit(chunks)
        left = len(chunks)
        while left:
            self.rollouts.pump()
            for chunk, scores in self.rollouts.evaluated():
                left -= 1
                done(chunk, scores)
            wait_any(self.rollouts.waiting_on, POLL_SECONDS)

    def close(self) -> None:
        """A Ray of our own ends with us, actors and all; of another's, what is ours is taken away."""
        if not self.session.own:
            self.crew.dismiss()
        self.session.close()
