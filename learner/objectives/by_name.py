"""`OBJECTIVES` is what objective.kind names; needs.py has what each requires."""

from collections.abc import Iterator

from learner.config import Config
from learner.config.sections import Objective as Settings
from learner.objectives.adjoint_matching import AdjointMatching
from learner.objectives.base import Objective
from learner.objectives.db import DagDB
from learner.objectives.ddpo import DDPO
from learner.objectives.fitted_nabla_db import FittedNablaDB, ForwardFittedNablaDB
from learner.objectives.grpo import GRPO
from learner.objectives.kl import DagKL
from learner.objectives.nabla_db import NablaDB
from learner.objectives.residual_db import ResidualDB
from learner.objectives.residual_nabla_db import ResidualNablaDB, ResidualNablaDBNoFlow
from learner.objectives.sub_trajectory_balance import ResidualSubTrajectoryBalance, SubTrajectoryBalance
from learner.objectives.trajectory_balance import ResidualTrajectoryBalance, TrajectoryBalance

OBJECTIVES: dict[str, type[Objective]] = {
    "dag_db": DagDB,
    "dag_kl": DagKL,
    "nabla_db": NablaDB,
    "residual_nabla_db": ResidualNablaDB,
    "residual_nabla_db_no_flow": ResidualNablaDBNoFlow,
    "ddpo": DDPO,
    "rtb": ResidualTrajectoryBalance,
    "rsub": ResidualSubTrajectoryBalance,
    "rdb": ResidualDB,
    "tb": TrajectoryBalance,
    "sub_tb": SubTrajectoryBalance,
    "grpo": GRPO,
    "adjoint_matching": AdjointMatching,
    "fitted_nabla_db": FittedNablaDB,
    "forward_fitted_nabla_db": ForwardFittedNablaDB,
}

AMONG = {"prompt": "within each prompt's trajectories of an epoch", "epoch": "within an epoch's trajectories"}


def target(config: Config, dimensions: int | None = None) -> str:
    """What the objective samples from when its loss is zero, in words; where D is not known, in terms of it."""
    settings = config.objective
    exponent, strength = f"{settings.beta:g}", settings.pretrained_strength
    if settings.log_prob_reduction == "mean":
        exponent = f"{settings.beta * dimensions:g}" if dimensions else f"{exponent} x D"
    words = {"exponent": exponent, "dimensions": dimensions or "numbers in a latent"}
    words["strength"] = "" if strength == 1 else f"^{strength:g}"
    text = OBJECTIVES[settings.kind].target.format(**words, **settings.model_dump())
    whose = "the image's" if config.rollout_settings().terminal is None else "its clean prediction's"
    if settings.last_transition == "skip" and config.needs.flow:
        text += "; the state before the last transition counts as the end"
    elif settings.last_transition == "skip" and config.needs.whole_trajectories:
        text += f"; all transitions but the last are trained, whose end has {whose} reward"
    elif isinstance(settings.window, tuple):
        text += f"; transitions {settings.window[0]} to {settings.window[1]} are trained, whose end has {whose} reward"
    because = "; ".join(_inexact(config))
    return f"no exact target ({because}), but towards a {text}" if because else text


def tilt(config: Config, dimensions: int | None = None) -> tuple[float | None, str]:
    """The true exponent b where the target is p_ref exp(b r), r the image's reward; else None, and why there is no such
    target. With mean log-probabilities b is known once D = `dimensions` is."""
    settings, needs = config.objective, config.needs
    kind, inexact = settings.kind, "; ".join(_inexact(config))
    if not needs.residual or inexact:
        return None, f"{kind} has no target p_ref x exp(beta x reward)" + (f" ({inexact})" if inexact else "")
    if settings.window != "all" and needs.reward_gradients and not (needs.adjoint or needs.fitted_flow):
        return None, f"{kind} with objective.window aims at the clean prediction's reward, not the image's"
    if not settings.beta:
        return None, "objective.beta is 0: the target is the base model itself"
    if needs.reward_gradients or needs.fitted_flow or settings.log_prob_reduction == "sum":
        return settings.beta, ""
    return (settings.beta * dimensions, "") if dimensions else (None, "how many numbers a latent has is not known")


def _inexact(config: Config) -> Iterator[str]:
    """Why not even at zero loss the formula holds. tests/learner/objectives/test_targets.py has them all."""
    settings, needs = config.objective, config.needs
    balanced = needs.flow or needs.whole_trajectories or needs.adjoint or needs.fitted_flow
    if balanced and config.train.shuffle_rewards:
        yield "train.shuffle_rewards: rewards are other pictures'"
    if balanced and config.sampler.kernel == "flow_grpo":
        yield "sampler.kernel=flow_grpo: the image keeps part of its first noise, which nothing moves"
    elif balanced and config.sampler.eta != 1:
        yield "sampler.eta below 1: the image keeps part of its first noise, which nothing moves"
    first, end = settings.span(config.sampler.steps)
    if balanced and first > 0:
        yield "objective.window: the states that it begins with keep their law"
    rollout = config.rollout_settings()
    if balanced and end < config.sampler.steps and rollout.terminal is None and rollout.noise_steps != end:
        yield "noise behind the trained transitions: of the rewards that it leads to their mean counts"
    moved_behind = config.sampler.adapter == "all" and isinstance(settings.window, tuple)
    if balanced and moved_behind and end < config.sampler.steps and rollout.terminal is None:
        yield "sampler.adapter=all: behind the window the LoRA moves what no loss sees"
    if needs.flow != "gradient":
        return
    if settings.reverse_transitions == "inner" or not settings.reverse_weight:
        yield "without the reverse loss at the last transition nothing ties the flow to the end"
    if settings.decay_terminal and settings.forward_looking_decay != "none":
        yield "objective.decay_terminal: the image's own reward fades too"
    if settings.kind == "residual_nabla_db" and settings.pretrained_strength != 1:
        yield "objective.pretrained_strength: powers of steps make no power of their product"


def describe(config: Config, dimensions: int) -> str:
    """What the run trains towards, in words, for latents of D = `dimensions`."""
    settings, kind = config.objective, OBJECTIVES[config.objective.kind]
    published = Settings(kind=settings.kind, setting=settings.setting, beta=settings.beta).model_dump()
    other = [key for key, value in settings.model_dump().items() if key != "reward_offset" and value != published[key]]
    but = f", but {', '.join(other)}" if other and settings.setting == "faithful" else ""
    text = f"{settings.kind} ({settings.setting}{but}): {target(config, dimensions)}"
    if config.reward.normalise != "none":
        text += f"; the reward's parts are standardised {AMONG[config.reward.normalise]}"
    if kind.needs.uses_ratio:
        nats = settings.clip_range * (dimensions if settings.log_prob_reduction == "mean" else 1)
        text += f"; the clip lets a transition's log-probability move by {nats:.3g} nats"
    return text


def prospects(config: Config) -> str:
    """What a run does, and what is known of its target, for whoever meets such a run for the first time."""
    weight, kind = config.objective.regulariser, config.objective.kind
    held = f"held back by objective.regulariser={weight:g}" if weight else "and nothing holds it back"
    needs = config.needs
    balanced = needs.flow or needs.whole_trajectories or needs.adjoint or needs.fitted_flow
    proven = f"; that {kind} reaches its target is shown on 1-D problems alone" if balanced else ""
    return f"what to expect: the reward is raised, {held}{proven}"
