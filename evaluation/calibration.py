"""sampler.spread of sampler.kernel=calibrated: V_t of diffusion/calibration.py, measured on the base model, with the
run's guidance, before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from diffusion.failures import RunFailure
from diffusion.trajectory import Chunk, Scores
from evaluation import settling
from evaluation.image_sets import ImageSet, Pools
from learner.config import Config

PICTURES = 64  # of different noise, their prompts in turn
DOING = "measuring the calibrated variances"


class NotCalibrated(RunFailure, ArithmeticError):
    """The base model draws what is no number."""


def pictures(config: Config, prompts: Sequence[str]) -> ImageSet:
    """That are drawn, by the base model."""
    drawn, chosen, snapshot = settling.of_the_base(config, prompts, PICTURES)
    evaluation = drawn.evaluation.model_copy(update={"images": PICTURES})
    return ImageSet(drawn.model_copy(update={"evaluation": evaluation}), chosen, snapshot)


def measure(wanted: ImageSet, pools: Pools, progress: Callable[[str, int, int], None]) -> list[float]:
    """V_t [N] by the grid's timesteps. Raises NotCalibrated, and what sampling and scoring do."""
    chunks, found = wanted.chunks(), dict[int, np.ndarray]()

    def done(chunk: Chunk, scores: Scores) -> None:
        assert scores.spread is not None
        found[chunk.index] = scores.spread
        progress(DOING, len(found), len(chunks))

    pools.judge(wanted.snapshot, chunks, done)
    means = np.concatenate([found[chunk.index] for chunk in chunks]).mean(0, dtype=np.float64)
    if not np.isfinite(means).all():
        raise NotCalibrated("the base model's clean predictions are no numbers: try model.dtype=float32")
    return means.tolist()
