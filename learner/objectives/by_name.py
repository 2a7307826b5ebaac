"""`OBJECTIVES` is what objective.kind names; needs.py has what each requires."""

from __future__ import annotations

from learner.objectives.base import Objective
from learner.objectives.db import DagDB
from learner.objectives.ddpo import DDPO
from learner.objectives.kl import DagKL
from learner.objectives.nabla_db import NablaDB
from learner.objectives.residual_nabla_db import ResidualNablaDB, ResidualNablaDBNoFlow

OBJECTIVES: dict[str, type[Objective]] = {
    "dag_db": DagDB,
    "dag_kl": DagKL,
    "nabla_db": NablaDB,
    "residual_nabla_db": ResidualNablaDB,
    "residual_nabla_db_no_flow": ResidualNablaDBNoFlow,
    "ddpo": DDPO,
}
