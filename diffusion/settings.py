"""How trajectories are made, in words and numbers. Imports no torch: the configuration is checked without it."""

from dataclasses import dataclass
from typing import Literal

Grid = Literal["ddim", "dpm_solver"]
StepKernel = Literal["ddim", "calibrated", "flow_grpo"]
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
    kernel: StepKernel = "ddim"
    spread: tuple[float, ...] | None = None  # [N] V_t of the calibrated kernel; None: it is being measured
    forward_looking: ForwardLooking = "base"  # whose clean predictions: the frozen reference's, its own; none: psi = 0
    clean_prediction: CleanPrediction = "conditional"  # as the published code; guided foretells the image better
    selection: Selection = "all"
    fraction: float = 1.0
    first: int = 0  # the trained transitions begin there
    end: int | None = None  # and end in this state; None: in the image
    terminal: int | None = None  # the state whose reward is the trajectory's: the image, or `end` by its prediction
    end_scored: bool = False  # that `end`'s prediction has a reward although the image's is the trajectory's
    adapted: tuple[int, int] | None = None  # transitions that the adapter is used in, from and up to; None: all
    noise_steps: int | None = None  # transitions that add noise; later ones are DDIM's without; None: all
    from_step: int = 0  # psi is 0 at steps before, and nothing is decoded there
    image_only: bool = False  # nothing but x_0 is scored
    reference: bool = False  # training chunks too have the frozen reference's densities
    state_precision: StatePrecision = "float32"  # states are rounded as they are made: log p_F is of what is stored
