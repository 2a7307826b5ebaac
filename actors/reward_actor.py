"""Ray shell of rewards.scorer.Scorer."""

from __future__ import annotations

import time
from dataclasses import replace

import ray

from diffusion.trajectory import CleanPredictions, Scores, Verdict
from learner import factory
from learner.config import Config


class RewardActor:
    def __init__(self, config: Config, shares_gpu: bool) -> None:
        factory.prepare_process(config)
        self.scorer, self.shares_gpu = factory.build_scorer(config), shares_gpu
        self.device = factory.device(config)

    def ready(self) -> bool:
        return True

    def fitting_batch(self, latent: tuple[int, int, int], prompt: str, share: float) -> int:
        """Images at once that this actor's `share` of the free GPU memory holds."""
        return self.scorer.batch or self.scorer.fitting_batch(latent, prompt, self.device, share)

    @ray.method(num_returns=2)
    def score(self, clean: CleanPredictions, batch: int) -> tuple[Scores, Verdict]:
        """Scores for the learner; terminal rewards and thumbnails for the driver. `batch` images at once, the same in
        every actor."""
        start = time.perf_counter()
        self.scorer.batch = batch
        scores = self.scorer.score(clean)
        if self.shares_gpu:
            self.scorer.rest()
        return replace(scores, thumbnails=()), scores.verdict(time.perf_counter() - start)
