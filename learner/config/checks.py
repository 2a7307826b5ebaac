"""Contradictions: what no single key of a configuration can show to be wrong. Imports no torch."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from diffusion.noise import select_transitions
from learner.config.schema import Config
from learner.objectives.needs import NEEDS
from records.passwords import PASSWORD, without_passwords
from rewards.names import wrong_normalise

MLFLOW_VARIABLES = " (MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD; or the whole as MLFLOW_TRACKING_URI)"
SECRET = "settings are kept in the run's files: leave user name and password out, and give them by the environment"


class ConfigError(ValueError):
    """Everything wrong with a configuration, one line a fault."""


def raise_faults(faults: Sequence[str]) -> None:
    """Raises a ConfigError if there are some; what is there twice is said once."""
    if faults:
        raise ConfigError(without_passwords("\n".join(dict.fromkeys(faults))))


def contradictions(config: Config) -> Iterator[str]:
    """A line for each; the config's keys are sound one by one."""
    for key, value in config.flat().items():
        text = "" if key == "prompts.path" and not isinstance(value, str) else str(value)  # prompts are words
        if (text != without_passwords(text)) if key == "mlflow.uri" else PASSWORD.search(text):
            yield f"{key}: {SECRET}{MLFLOW_VARIABLES if key == 'mlflow.uri' else ''}"
    ranks = (config.learner.ranks or 1) if config.run.runner == "ray" else 1
    chunk, epoch, updates = config.sampler.chunk_size, config.train.trajectories, config.train.updates_per_epoch
    if epoch % chunk:
        yield f"sampler.chunk_size: {chunk} does not divide train.trajectories {epoch}"
    elif (epoch // chunk) % (updates * ranks):
        yield (
            f"train.updates_per_epoch: the epoch's {epoch // chunk} chunks do not divide evenly among {updates} "
            f"updates of {ranks} learner ranks; make train.trajectories a multiple of {chunk * updates * ranks}"
        )
    if chunk % config.prompts.per_prompt:
        yield f"prompts.per_prompt: {config.prompts.per_prompt} does not divide sampler.chunk_size {chunk}"
    if config.objective.forward_looking_from >= config.sampler.steps:
        yield f"objective.forward_looking_from: must be below sampler.steps {config.sampler.steps}"
    spread, steps = config.sampler.spread, config.sampler.steps
    if config.sampler.kernel == "calibrated" and spread is not None and len(spread) != steps:
        yield f"sampler.spread: it is of {len(spread)} steps, not of sampler.steps {steps}; or set sampler.kernel=ddim"
    if config.train.shuffle_rewards and config.sampler.transitions != "all":
        yield "train.shuffle_rewards: only with sampler.transitions=all (other states have no reward to swap)"
    if config.train.shuffle_rewards and chunk == 1:
        yield "train.shuffle_rewards: needs a sampler.chunk_size above 1"
    if config.evaluation.images % chunk:
        yield f"evaluation.images: {config.evaluation.images} is not a multiple of sampler.chunk_size {chunk}"
    given, needs, widths = config.objective, config.needs, config.flow.widths
    for key in ("replay_updates", "max_staleness"):
        if getattr(config.train, key) and needs.uses_ratio:
            allowed = ", ".join(kind for kind, other in NEEDS.items() if not other.uses_ratio)
            yield (
                f"train.{key}: {given.kind} learns from the ratio of the current policy to the one that sampled, and "
                f"cannot use trajectories of earlier policies; use train.{key}=0, or one of {allowed}"
            )
    if (config.flow.fit_steps or config.flow.warmup_steps) and needs.flow != "log_flow":
        allowed = ", ".join(kind for kind, other in NEEDS.items() if other.flow == "log_flow")
        yield (
            f"flow.fit_steps, flow.warmup_steps: {given.kind} has no flow network that could be fitted alone; "
            f"set both to 0, or use one of {allowed}"
        )
    if needs.flow and not _groups_fit(widths):
        yield f"flow.widths: {list(widths)} cannot be normalised in groups; use widths such as [32, 64]"
    if needs.flow == "gradient" and config.flow.stem_stride != 1:
        yield f"flow.stem_stride: {given.kind} has a flow network of full size; set it to 1"
    if needs.reward_gradients and needs.inner_rewards and not needs.flow and given.forward_looking == "none":
        yield f"objective.forward_looking: none leaves {given.kind} nothing to learn from; use base or snapshot"
    if fault := wrong_normalise(config.reward.normalise):
        yield fault
    if config.reward.normalise in ("prompt", "epoch") and not needs.maximises:
        allowed = ", ".join(kind for kind, other in NEEDS.items() if other.maximises)
        yield (
            f"reward.options.normalise: {given.kind}'s target is made of r, as p_ref exp(beta r), and would change "
            "with the policy, by whose pictures r is standardised; set it to none, or objective.kind to one of "
            f"{allowed}"
        )
    if config.reward.normalise == "prompt" and config.prompts.per_prompt < 2:
        yield (
            "prompts.per_prompt: reward.options.normalise=prompt compares a prompt's trajectories; make it at least 2, "
            "or set normalise to epoch"
        )
    if needs.reward_gradients and config.train.shuffle_rewards:
        yield f"train.shuffle_rewards: {given.kind} learns from gradients of rewards, which cannot change places"
    if isinstance(given.window, tuple) and not 0 <= given.window[0] <= given.window[1] < config.sampler.steps:
        yield f"objective.window: {list(given.window)} is not within 0 to {config.sampler.steps - 1}"
        return
    if given.window != "all" and given.last_transition == "skip":
        yield "objective.window, objective.last_transition: give one of them"
    behind = given.window == "auto" or given.span(config.sampler.steps)[1] < config.sampler.steps
    if given.later_kl and (config.sampler.noise == "window" or not behind):
        yield (
            "objective.later_kl: no transition with noise is behind the window; set it to 0, or "
            + ("sampler.noise=all" if behind else "objective.window")
        )
    if (needs.whole_trajectories or needs.fitted_flow) and config.sampler.transitions != "all":
        yield f"sampler.transitions: {given.kind} sums over trajectories; set it to all (a part: objective.window)"
    if given.kind in ("rtb", "tb") and given.log_z == "group" and config.prompts.per_prompt < 2:
        yield (
            f"prompts.per_prompt: {given.kind} compares a prompt's trajectories; make it at least 2, or set "
            "objective.log_z=learned"
        )
    if config.learner.optimizer == "natural":
        if not needs.least_squares:
            allowed = ", ".join(kind for kind, other in NEEDS.items() if other.least_squares)
            yield f"learner.optimizer: {given.kind} is no sum of squares for natural; use adamw, or one of {allowed}"
        if needs.flow and not config.flow.fit_steps:
            yield "flow.fit_steps: with learner.optimizer=natural the flow network learns in them alone; set some"
        if given.later_kl:
            yield "objective.later_kl: natural steps have none; set it to 0, and sampler.adapter=window to the same end"
        if config.train.replay_updates:
            yield "train.replay_updates: natural steps use earlier epochs by learner.natural_epochs; set it to 0"
        if given.regulariser or given.penalty != "squared" or given.transition_weight != "uniform":
            yield (
                "learner.optimizer: natural solves the plain squares; set objective.regulariser=0, penalty=squared and "
                "transition_weight=uniform"
            )
        if (least := 8 * config.prompts.per_prompt) > epoch:
            yield (
                f"train.trajectories: natural keeps one group of prompts.per_prompt in eight apart to judge steps by; "
                f"make {epoch} at least {least}, or prompts.per_prompt smaller"
            )
    for name in ("noise", "adapter"):
        if getattr(config.sampler, name) == "window" and given.window == "all":
            yield f"sampler.{name}: window, but objective.window is all; name the window, or set sampler.{name}=all"
    if given.kind == "grpo" and config.prompts.per_prompt < 2:
        yield "prompts.per_prompt: grpo compares a prompt's trajectories; make it at least 2"
    if needs.compares_groups:
        sampler, (first, end) = config.sampler, given.span(config.sampler.steps)
        end = end if given.window != "auto" else 1  # whatever it comes out as
        each = select_transitions(sampler.transitions, sampler.transition_fraction, end - first, 0, 0, [0]).shape[1]
        if chunk * each % given.group_size:
            yield (
                f"objective.group_size: {given.group_size} does not divide the {chunk * each} transitions of a chunk "
                f"(sampler.chunk_size {chunk} times {each})"
            )


def untrainable(config: Config) -> Iterator[str]:
    """What has no target to train towards, a line each. It may be judged and drawn with: no contradiction."""
    key, value = ("kernel", "ddim") if config.sampler.kernel == "flow_grpo" else ("eta", 1)
    if config.needs.noising_kernel and getattr(config.sampler, key) != value:
        allowed = ", ".join(kind for kind, other in NEEDS.items() if not other.noising_kernel)
        when = "with flow_grpo never" if key == "kernel" else "at eta 1 alone"
        yield (
            f"sampler.{key}: {config.objective.kind} compares the sampler's steps with the noising kernel, whose "
            f"reverse they are {when}; use sampler.{key}={value}, or one of {allowed}"
        )


def _groups_fit(widths: Sequence[int]) -> bool:
    """Whether both flow networks can be built with these channels (learner/flow.py)."""
    if not widths or min(widths) < 8:
        return False
    groups = [min(32, low // 4, high // 4) for low, high in pairwise([widths[0], *widths])]
    sides = [low % g == high % g == 0 for g, (low, high) in zip(groups, pairwise([widths[0], *widths]), strict=True)]
    first = min(32, widths[0] // 4)
    return all(sides) and all(width % first == 0 and width % (widths[0] // 8) == 0 for width in widths)
