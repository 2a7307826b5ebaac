"""The in-process runner: one sampler, one scorer, one learner in turns, no Ray: on one GPU they share its memory. Actor
and rank counts do not apply."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from diffusion.trajectory import Chunk, Receipt, Scores, Verdict
from learner import factory, receipts
from learner.config import Config
from learner.ledger import Ledger
from learner.prompts import example_prompt
from learner.runner import EpochResult, Hooks
from learner.update import Scored


class InProcessRunner:
    """Runs every part in turn in this process. See learner/runner.py for the contract."""

    ranks = 1

    def __init__(self, config: Config, files: dict[str, bytes] | None = None) -> None:
        factory.prepare_process(config)
        self.config = config
        self.hooks = Hooks()
        self.sampler = factory.build_sampler(config)
        self.scorer = factory.build_scorer(config)
        self.learner = factory.build_learner(config, files)
        self.snapshot = self.learner.published
        self.dimensions = self.learner.dimensions
        self.scorer.batch = config.reward.batch or self.scorer.fitting_batch(
            self.learner.model.latent_shape, example_prompt(config), factory.device(config)
        )
        self.batch_sizes = {"micro_batch": self.learner.fit_micro_batch(), "score": self.scorer.batch}
        self.description = "in process: 1 sampler, 1 scorer, 1 learner"
        self._node = socket.gethostname()

    def train_epoch(self, epoch: int, beta: float, chunks: Sequence[Chunk], ledger: Ledger) -> EpochResult:
        scored: list[Scored] = []
        accounts: list[tuple[Receipt, Verdict]] = []
        for chunk in chunks:
            pair, receipt, verdict = self._sample_and_score(chunk)
            ledger.advance(chunk.trajectory_ids, "sampled")
            ledger.advance(chunk.trajectory_ids, "scored")
            scored.append(pair)
            accounts.append((receipt, verdict))
            self.hooks.progress("sampling and scoring", len(scored), len(chunks))
        start = time.perf_counter()
        updates = self.config.train.updates_per_epoch
        size = len(scored) // updates
        training = self.learner.train_epoch(epoch, beta, [scored[i * size : (i + 1) * size] for i in range(updates)])
        ledger.set_aside(one.facts["trajectory_id"] for one in training.set_aside)
        ledger.advance(training.trajectory_ids, "trained")
        self.snapshot = self.learner.publish(self.snapshot.version + 1)
        return EpochResult(
            chunks,
            [receipt for receipt, _ in accounts],
            [verdict for _, verdict in accounts],
            training,
            sum(receipt.seconds for receipt, _ in accounts),
            sum(verdict.seconds for _, verdict in accounts),
            time.perf_counter() - start,
            training.set_aside,
        )

    def evaluate(self, chunks: Sequence[Chunk]) -> list[Scores]:
        found = []
        for chunk in chunks:
            found.append(self._sample_and_score(chunk)[0][1])
            self.hooks.progress("evaluating", len(found), len(chunks))
        return found

    def checkpoint_files(self) -> dict[str, bytes]:
        return self.learner.state_files()

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
