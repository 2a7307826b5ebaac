"""`OBJECTIVES` is what objective.kind names; needs.py has what each requires."""

from learner.config import Config
from learner.config.sections import Objective as Settings
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


def target(settings: Settings, dimensions: int | None = None) -> str:
    """What the objective samples from when its loss is zero, in words; where D is not known, in terms of it."""
    exponent, strength = f"{settings.beta:g}", settings.pretrained_strength
    if settings.log_prob_reduction == "mean":
        exponent = f"{settings.beta * dimensions:g}" if dimensions else f"{exponent} x D"
    words = {"exponent": exponent, "dimensions": dimensions or "numbers in a latent"}
    words["strength"] = "" if strength == 1 else f"^{strength:g}"
    return OBJECTIVES[settings.kind].target.format(**words, **settings.model_dump())


def describe(config: Config, dimensions: int) -> str:
    """What the run trains towards, in words, for latents of D = `dimensions`."""
    settings, kind = config.objective, OBJECTIVES[config.objective.kind]
    published = Settings(kind=settings.kind, setting=settings.setting, beta=settings.beta).model_dump()
    other = [key for key, value in settings.model_dump().items() if key != "reward_offset" and value != published[key]]
    but = f", but {', '.join(other)}" if other and settings.setting == "faithful" else ""
    text = f"{settings.kind} ({settings.setting}{but}): {target(settings, dimensions)}"
    if kind.needs.uses_ratio:
        nats = settings.clip_range * (dimensions if settings.log_prob_reduction == "mean" else 1)
        text += f"; the clip lets a transition's log-probability move by {nats:.3g} nats"
    return text


def prospects(config: Config) -> str:
    """What a run does, and what is known of its target, for whoever meets such a run for the first time."""
    weight, kind = config.objective.regulariser, config.objective.kind
    held = f"held back by objective.regulariser={weight:g}" if weight else "and nothing holds it back"
    proven = f"; that {kind} reaches its target is shown on 1-D problems alone" if config.needs.flow else ""
    return f"what to expect: the reward is raised, {held}{proven}"
