"""Ray shell of rewards.scorer.Scorer."""

from __future__ import annotations

import ray

from diffusion.trajectory import CleanPredictions, Scores
from learner import factory
from learner.config import Config


class RewardActor:
    def __init__(self, config: Config) -> None:
        factory.prepare_process(config)
        self.scorer = factory.build_scorer(config)

    def ready(self) -> bool:
        return True

    @ray.method(num_returns=2)
    def score(self, clean: CleanPredictions) -> tuple[Scores, list[float]]:
        """Scores for the learner, and the terminal rewards for the driver."""
        scores = self.scorer.score(clean)
        return scores, [float(value) for value in scores.rewards[:, -1]]
