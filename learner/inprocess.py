"""The in-process runner: one sampler, one scorer, one learner, no Ray. Actor and rank counts do not apply."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from diffusion import lora
from diffusion.trajectory import Chunk, Scores
from learner import factory
from learner.config import Config
from learner.runner import EpochResult
from learner.update import Scored


class InProcessRunner:
    """Runs every part in turn in this process. See learner/runner.py for the contract."""

    def __init__(self, config: Config) -> None:
        factory.prepare_process(config)
        self.config = config
        self.sampler = factory.build_sampler(config)
        self.scorer = factory.build_scorer(config)
        self.learner = factory.build_learner(config)
        self.snapshot = self.learner.published
        self.dimensions = self.learner.dimensions
        self.description = "in process: 1 sampler, 1 scorer, 1 learner"

    def train_epoch(self, epoch: int, beta: float, chunks: Sequence[Chunk]) -> EpochResult:
        scored, sample_seconds, score_seconds = self._sample_and_score(chunks)
        start = time.perf_counter()
        updates = self.config.train.updates_per_epoch
        size = len(scored) // updates
        metrics = self.learner.train_epoch(epoch, beta, [scored[i * size : (i + 1) * size] for i in range(updates)])
        self.snapshot = self.learner.publish(self.snapshot.version + 1)
        train_seconds = time.perf_counter() - start
        rewards = [float(r) for _, scores in scored for r in scores.rewards[:, -1]]
        return EpochResult(rewards, metrics, sample_seconds, score_seconds, train_seconds)

    def evaluate(self, chunks: Sequence[Chunk]) -> list[Scores]:
        return [scores for _, scores in self._sample_and_score(chunks)[0]]

    def save_lora(self, folder: Path) -> None:
        lora.save_files(self.learner.model.unet, folder)

    def close(self) -> None:
        """Nothing to stop."""

    def _sample_and_score(self, chunks: Sequence[Chunk]) -> tuple[list[Scored], float, float]:
        scored, sampling, scoring = [], 0.0, 0.0
        for chunk in chunks:
            start = time.perf_counter()
            trajectories, clean = self.sampler.sample(chunk, self.snapshot)
            middle = time.perf_counter()
            scored.append((trajectories, self.scorer.score(clean)))
            sampling += middle - start
            scoring += time.perf_counter() - middle
        return scored, sampling, scoring
