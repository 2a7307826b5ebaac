"""How trajectories are made, in words and numbers. Imports no torch: the configuration is checked without it."""

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
    """The same for rollout, training and evaluation; learner/config/sections.py says more of each."""

    num_steps: int = 50
    guidance: float = 5.0
    eta: float = 1.0
    grid: Grid = "ddim"
    forward_looking: ForwardLooking = "base"  # whose clean predictions: the frozen reference's, its own; none: psi = 0
    clean_prediction: CleanPrediction = "conditional"  # as the published code; guided foretells the image better
    selection: Selection = "all"
    fraction: float = 1.0
    skip_last: bool = False  # the last transition is not trained on; the state before it has its prediction's reward
    from_step: int = 0  # psi is 0 at steps before, and nothing is decoded there
    image_only: bool = False  # nothing but x_0 is scored
    state_precision: StatePrecision = "float32"  # states are rounded as they are made: log p_F is of what is stored
