"""How trajectories are made, in words and numbers. Imports no torch: the configuration is checked without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Grid = Literal["ddim", "dpm_solver"]
Reduction = Literal["sum", "mean"]
Selection = Literal["all", "random", "low_variance"]
ForwardLooking = Literal["base", "snapshot", "none"]
CleanPrediction = Literal["conditional", "guided"]
StatePrecision = Literal["float32", "float16"]


@dataclass(frozen=True)
class RolloutSettings:
    """How trajectories are made; the same for rollout, training and evaluation.

    `forward_looking` says which weights give the clean predictions of inner states: the frozen reference
    (adapter off, one more pass a state), the rollout's own, or none (psi = 0); `clean_prediction` whether from the
    conditional output (the published code) or the guided one, which foretells the image better. `skip_last` leaves
    the last transition out of training; the state before it then counts as terminal, with the reward of its clean
    prediction. With `image_only` nothing but x_0 is scored. psi is 0 at steps before `from_step`, and nothing is
    decoded there. States are rounded to `state_precision` as they are made, so that what is stored is what log p_F is
    of; model outputs and clean predictions are stored in it too.
    """

    num_steps: int = 50
    guidance: float = 5.0
    eta: float = 1.0
    grid: Grid = "ddim"
    forward_looking: ForwardLooking = "base"
    clean_prediction: CleanPrediction = "conditional"
    selection: Selection = "all"
    fraction: float = 1.0
    skip_last: bool = False
    from_step: int = 0
    image_only: bool = False
    state_precision: StatePrecision = "float32"
