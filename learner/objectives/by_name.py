"""`OBJECTIVES` is what objective.kind names; needs.py has what each requires."""

from __future__ import annotations

from typing import TYPE_CHECKING

from learner.config.sections import Objective as Settings
from learner.objectives.base import Objective
from learner.objectives.db import DagDB
from learner.objectives.ddpo import DDPO
from learner.objectives.kl import DagKL
from learner.objectives.nabla_db import NablaDB
from learner.objectives.residual_nabla_db import ResidualNablaDB, ResidualNablaDBNoFlow

if TYPE_CHECKING:
    from learner.config import Config

OBJECTIVES: dict[str, type[Objective]] = {
    "dag_db": DagDB,
    "dag_kl": DagKL,
    "nabla_db": NablaDB,
    "residual_nabla_db": ResidualNablaDB,
    "residual_nabla_db_no_flow": ResidualNablaDBNoFlow,
    "ddpo": DDPO,
}


def describe(config: Config, dimensions: int) -> str:
    """What the run trains towards, in words, for latents of D = `dimensions`."""
    given, kind = config.objective, OBJECTIVES[config.objective.kind]
    published = {**Settings(kind=given.kind, setting=given.setting).model_dump(), "beta": given.beta}
    other = [key for key, value in given.model_dump().items() if key != "reward_offset" and value != published[key]]
    but = f", but {', '.join(other)}" if other and given.setting == "faithful" else ""
    text = f"{given.kind} ({given.setting}{but}): {kind.target(given, dimensions)}"
    if kind.needs.uses_ratio:
        nats = given.clip_range * (dimensions if given.log_prob_reduction == "mean" else 1)
        text += f"; the clip lets a transition's log-probability move by {nats:.3g} nats"
    return text
