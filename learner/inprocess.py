"""The in-process runner: one sampler, one scorer, one learner in turns, no Ray: on one GPU they share its memory. Actor
and rank counts do not apply."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, Receipt, Scores, Verdict
from learner import build
from learner.config import Config
from learner.prompts import example_prompt
from learner.protocol import receipts
from learner.protocol.buffer import Pipeline, key_of
from learner.protocol.ledger import Ledger
from learner.protocol.runner import EpochResult, Hooks, Vitals
from learner.update import Scored
from rewards.registry import Reward


class InProcessRunner:
    """Runs every part in turn in this process. See learner/protocol/runner.py for the contract."""

    ranks = 1

    def __init__(self, config: Config, files: dict[str, bytes] | None = None, own_reward: Reward | None = None) -> None:
        parts = build.parts(config, own_reward)
        self.config = config
        self.hooks = Hooks()
        self.sampler, self.scorer, self.learner = parts.sampler(), parts.scorer(), parts.learner(files)
        self.snapshot = self.learner.published
        self.dimensions = self.learner.dimensions
        self.scorer.batch = config.reward.batch or self.scorer.fitting_batch(
            self.learner.model.latent_shape, example_prompt(config), build.device(config)
        )
        self.batch_sizes = {"micro_batch": self.learner.fit_micro_batch(), "score": self.scorer.batch}
        self.description = "in process: 1 sampler, 1 scorer, 1 learner"
        self._node = socket.gethostname()

    def begin(self, chunks_of: Callable[[int], Sequence[Chunk]], epochs: range, ledger: Ledger) -> None:
        self.pipeline = Pipeline(chunks_of, epochs, 0, ledger)  # nothing runs beside the learner here
        self.ledger = ledger

    def train_epoch(self, epoch: int, beta: float) -> EpochResult:
        chunks = self.pipeline.admit()
        for chunk in chunks:
            self.pipeline.given(key_of(chunk), self.snapshot)
            (trajectories, scores), receipt, verdict = self._sample_and_score(chunk)
            self.pipeline.sampled(key_of(chunk), receipt, trajectories, None)
            self.pipeline.scored(key_of(chunk), verdict, scores)
            self.hooks.progress("sampling and scoring", self.pipeline.counts("train", epoch)[0], len(chunks))
        self.hooks.progress("training", 0, 1)
        start = time.perf_counter()
        works = self.pipeline.take(epoch, self.snapshot.version)
        scored = [(work.trajectories, work.scores) for work in works]
        updates = self.config.train.updates_per_epoch
        size = len(scored) // updates
        training = self.learner.train_epoch(epoch, beta, [scored[i * size : (i + 1) * size] for i in range(updates)])
        self.ledger.set_aside(epoch, (one.facts["trajectory_id"] for one in training.set_aside))
        self.ledger.advance(epoch, training.trajectory_ids, "trained")
        self.snapshot = self.learner.publish(self.snapshot.version + 1)
        seconds = time.perf_counter() - start
        result = EpochResult.of(works, training, training.set_aside, 0.0, 0.0, seconds)
        return replace(
            result,
            sample_seconds=sum(receipt.seconds for receipt in result.receipts),
            score_seconds=sum(verdict.seconds for verdict in result.verdicts),
        )

    def evaluate(self, chunks: Sequence[Chunk]) -> list[Scores]:
        found = []
        for chunk in chunks:
            found.append(self._sample_and_score(chunk)[0][1])
            self.hooks.progress("evaluating", len(found), len(chunks))
        return found

    def checkpoint_files(self) -> dict[str, bytes]:
        return self.learner.state_files()

    def vitals(self) -> Vitals:
        return Vitals(self.snapshot.version, self.pipeline.in_work, (0.0, 0))

    def closed(self, epoch: int) -> None:
        self.pipeline.close(epoch)

    def close(self) -> None:
        """Nothing to stop."""

    def _sample_and_score(self, chunk: Chunk) -> tuple[Scored, Receipt, Verdict]:
        start = time.perf_counter()
        trajectories, clean = self.sampler.sample(chunk, self.snapshot)
        middle = time.perf_counter()
        receipt = trajectories.receipt(self._node, middle - start)
        receipts.check(receipt, self.snapshot, f"chunk {chunk.index} of {chunk.where}")
        scores = self.scorer.score(clean)
        return (trajectories, scores), receipt, scores.verdict(time.perf_counter() - middle)


class InProcessPools:
    """See evaluation/image_sets.py's Pools."""

    description = "in process: 1 sampler, 1 scorer"

    def __init__(self, config: Config) -> None:
        self.sampler, self.scorer = build.build_sampler(config), build.build_scorer(config)

    def judge(self, snapshot: Snapshot, chunks: Sequence[Chunk], done: Callable[[Chunk, Scores], None]) -> None:
        for chunk in chunks:
            trajectories, clean = self.sampler.sample(chunk, snapshot)
            receipts.check(trajectories, snapshot, f"chunk {chunk.index} of {chunk.where}")
            done(chunk, self.scorer.score(clean))

    def close(self) -> None:
        """Nothing to stop."""
