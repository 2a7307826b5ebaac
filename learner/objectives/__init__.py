"""GFlowNet objectives as pure tensor maths. `OBJECTIVES` is what `objective.kind` names; a new one is a subclass of
base.Objective in a file here and a line in both tables."""

from __future__ import annotations

from typing import Literal

from learner.objectives.base import Objective
from learner.objectives.db import DagDB
from learner.objectives.ddpo import DDPO
from learner.objectives.kl import DagKL
from learner.objectives.nabla_db import NablaDB
from learner.objectives.residual_nabla_db import ResidualNablaDB, ResidualNablaDBNoFlow

Kind = Literal["dag_db", "dag_kl", "nabla_db", "residual_nabla_db", "residual_nabla_db_no_flow", "ddpo"]

OBJECTIVES: dict[str, type[Objective]] = {
    "dag_db": DagDB,
    "dag_kl": DagKL,
    "nabla_db": NablaDB,
    "residual_nabla_db": ResidualNablaDB,
    "residual_nabla_db_no_flow": ResidualNablaDBNoFlow,
    "ddpo": DDPO,
}
