"""Ray shell of rewards.scorer.Scorer."""

from __future__ import annotations

import time
from dataclasses import replace

import ray

from diffusion.trajectory import CleanPredictions, Scores, Verdict
from learner import factory
from learner.config import Config


class RewardActor:
    def __init__(self, config: Config) -> None:
        factory.prepare_process(config)
        self.scorer = factory.build_scorer(config)

    def ready(self) -> bool:
        return True

    @ray.method(num_returns=2)
    def score(self, clean: CleanPredictions) -> tuple[Scores, Verdict]:
        """Scores for the learner; terminal rewards and thumbnails for the driver."""
        start = time.perf_counter()
        scores = self.scorer.score(clean)
        return replace(scores, thumbnails=()), scores.verdict(time.perf_counter() - start)
