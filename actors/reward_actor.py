"""Ray shell of rewards.scorer.Scorer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import ray

from diffusion.trajectory import CleanPredictions, Scores, Verdict

if TYPE_CHECKING:
    from rewards.scorer import Scorer


class RewardActor:
    def __init__(self, build: Callable[[], Scorer], shares_gpu: bool) -> None:
        self.scorer, self.shares_gpu = build(), shares_gpu

    def ready(self) -> bool:
        return True

    def fitting_batch(self, latent: tuple[int, int, int], prompt: str, device: str, share: float) -> int:
        """Images at once that this actor's `share` of the free GPU memory holds."""
        return self.scorer.batch or self.scorer.fitting_batch(latent, prompt, device, share)

    @ray.method(num_returns=2)
    def score(self, clean: CleanPredictions, batch: int) -> tuple[Scores, Verdict]:
        """Scores for the learner; terminal rewards and thumbnails for the driver. `batch` images at once, the same in
        every actor."""
        start = time.perf_counter()
        scores = self._score(clean, batch)
        return replace(scores, thumbnails=()), scores.verdict(time.perf_counter() - start)

    @ray.method(num_returns=2)
    def score_row(self, clean: CleanPredictions, row: int, batch: int) -> tuple[Scores, bool]:
        """One trajectory of a chunk; thumbnails stay, for `join`."""
        return self._score(clean.only(row), batch), True

    @ray.method(num_returns=2)
    def join(self, rows: list[int], bad: dict[int, str], *scores: Scores) -> tuple[Scores, Verdict]:
        """As `score`, of a chunk whose `rows` were scored apart; `bad` has the reasons of those that could not be.

        Raises:
            BadReward: nothing of the chunk can be used.
        """
        from rewards.scorer import BadReward  # here: emulated actors need no torch

        joined = Scores.join(dict(zip(rows, scores, strict=True)), bad)
        if len(joined.bad) == len(joined.rewards):
            first = joined.bad[min(joined.bad)]
            raise BadReward(f"no trajectory of chunk {joined.chunk.index} of {joined.chunk.where} is good; {first}")
        return replace(joined, thumbnails=()), joined.verdict(0.0)

    def _score(self, clean: CleanPredictions, batch: int) -> Scores:
        self.scorer.batch = batch
        scores = self.scorer.score(clean)
        if self.shares_gpu:
            self.scorer.rest()
        return scores
