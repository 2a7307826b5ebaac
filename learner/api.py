"""The job, for the command and for Python: `learner.train(config, reward=my_function)`. Here the epoch loop meets its
runner, its records and its views."""

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from cluster import signals
from cluster.nodes import totals
from cluster.placement import Placement, Share, place_for
from cluster.session import nodes_at_hand
from diffusion.failures import RunFailure
from diffusion.locate import family_of
from diffusion.parts import check_tiny_decoder, cut_prompts
from diffusion.rehearsal import check_model
from evaluation import calibration, collapse, settling
from evaluation.image_sets import Cache, Pools
from learner import controller, trial
from learner.config import DEFAULT_CONFIG, Config, ConfigError, load_config, raise_faults, resolve
from learner.config.checks import untrainable
from learner.inprocess import InProcessPools, InProcessRunner
from learner.open_run import OpenRun, open_run
from learner.prompts import evaluation_prompts, training_prompts
from learner.protocol.runner import Hooks, Runner
from records import checkpoint, environment
from records.checkpoint import CheckpointError
from records.run_folder import TRACEBACK
from records.storage import StorageError
from records.words import short
from reports.pictures import contact_sheet, png
from reports.summary import plural
from reports.views import RunViews
from rewards import judges, registry
from rewards.registry import UnknownReward, UserReward
from rewards.weights import NotFromHub

Reward = Callable[[Tensor, Sequence[str]], Tensor]
Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainedRun:
    """What a finished run left."""

    run_dir: str  # directory or URL; README.md says what is in it
    metrics: list[dict[str, Any]]  # a dict an epoch, as in metrics.jsonl; epoch -1 is the evaluation before training
    lora: str  # folder for diffusers' `load_lora_weights`; for ComfyUI and A1111 its kohya.safetensors, the same


def train(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    reward: Reward | str | None = None,
    prompts: Sequence[str] | None = None,
    runner: Literal["ray", "inprocess"] | None = None,
    run_dir: str | Path | None = None,
    say: Say = print,
) -> TrainedRun:
    """Train to the end, or go on with the run in `run_dir`; the same as `python -m learner.run`.

    Args:
        config: a YAML preset's path, sections of keys as a dict, or a Config; default: configs/shapes_alignment.yaml.
        settings: `{"section.key": value}`, in place of the config's, as are prompts, runner (run.runner) and run_dir.
        reward: a function `(images [B, 3, H, W] float in [0, 1], prompts) -> [B]`, or a reward's name. With an
            attribute `differentiable = True` it serves the nabla objectives. On Ray it is sent to the reward actors.
            learner.evaluate and learner.compare run it later if it can be imported and they are given its name.
        say: gets each line of progress.

    Raises:
        ConfigError: bad settings; a line for each fault.
        RunFailure: the run cannot be begun or ended early; the same call goes on from its last closed epoch.
    """
    own, name = None, reward
    if callable(reward):  # reward.name is where it can be imported from, if it can
        kind = reward if hasattr(reward, "__qualname__") else type(reward)
        own, name = reward, f"{kind.__module__}:{kind.__qualname__}"
    keys = {"reward.name": name, "prompts.path": prompts, "run.runner": runner, "run.dir": run_dir and str(run_dir)}
    changes = {**(settings or {}), **{key: value for key, value in keys.items() if value is not None}}
    source = config.model_dump(mode="json") if isinstance(config, Config) else config
    built = load_config(source, changes)

    @functools.cache
    def warn(text: str) -> None:
        say(f"warning: {text}")

    raise_faults([*untrainable(built), *(trial.faults(built, own) if built.reward.try_first else ())])
    read, _, resources = check(built, warn, own)
    opened = open_run(built, Path("run" if isinstance(source, Mapping) else source or DEFAULT_CONFIG), read, warn)
    run(opened, resources, say, lambda text: None, own)
    storage = opened.records.storage
    return TrainedRun(str(storage), opened.records.lines, str(checkpoint.lora_folder(storage)))


def check(
    config: Config, warn: Say, own_reward: Reward | None = None, counted: str | None = None
) -> tuple[list[str], Placement, dict[str, float]]:
    """Everything that would otherwise fail only after actors are up: the prompts, what would run where, and the
    cluster's resources. `counted`: for a plan, where the model is counted (`locate.countable`); of what a reward lacks
    because a hub did not give it, a plan only warns. Raises a ConfigError, a line for each fault, or
    ClusterUnreachable."""
    faults = list(untrainable(config))

    def attempt(step: Callable[[], Any]) -> Any:  # None where it fails
        try:
            return step()
        except (RunFailure, ValueError) as error:
            if counted and isinstance(error, NotFromHub):
                warn(str(error))
            else:
                faults.append(str(error))

    sampler, reward, evaluation = config.sampler, config.reward, config.evaluation
    named, in_process = str(resolve(config.model.path)), config.run.runner == "inprocess"
    path = counted or named
    prompts = attempt(lambda: [*training_prompts(config), *evaluation_prompts(config)]) or []
    family = attempt(lambda: family_of(path))
    unconditional = not family.text if family else None
    if unconditional and (config.prompts.path is not None or evaluation.prompts is not None):
        faults.append(f"prompts.path, evaluation.prompts: {path} takes no prompts; set prompts.path=null")
    if unconditional and sampler.guidance != 1:
        faults.append(f"sampler.guidance: {path} takes no prompts, so there is nothing to guide; set it to 1")
    if unconditional is False and config.prompts.path is None:
        faults.append(f"prompts.path: {path} takes prompts; name a file of them")
    if unconditional is not None:  # there is a pipeline
        there = path == named
        if (
            unconditional is False
            and there
            and prompts
            and (said := attempt(lambda: cut_prompts(path, prompts, config.model.text_tokens)))
        ):
            warn(said)
        grid = sampler.steps, sampler.eta, sampler.grid, config.model.pixels
        kernel = attempt(lambda: check_model(path, *grid, sampler.kernel, sampler.spread, whole=there))
        given = config.objective.window != "auto"  # a measured one ends before a step without noise
        if kernel and given and config.objective.span(sampler.steps)[1] > kernel.noisy_steps:
            faults.append(
                f"objective.last_transition: the last step of {path}, to the image, has no noise, and nothing is to be "
                "learned of it; set it to skip, or name an objective.window before it"
            )
        if config.objective.forward_looking_decoder == "tiny":
            attempt(lambda: check_tiny_decoder(str(resolve(config.model.tiny_decoder)), path))
        looking = config.needs.inner_rewards and config.objective.forward_looking != "none"
        if family.distilled and looking and config.objective.clean_prediction != "guided":
            faults.append(f"objective.clean_prediction: {path} has no output without guidance; set it to guided")
    needing = config.objective.kind if config.needs.reward_gradients else None
    if own_reward:
        attempt(lambda: registry.check_gradient(own_reward, reward.name, needing))
    else:
        attempt(lambda: registry.check(reward.name, reward.weights, reward.options, prompts, needing))
    attempt(lambda: judges.check(evaluation.held_out, evaluation.features, evaluation.clip, prompts))
    if in_process and config.model.device == "cuda" and not torch.cuda.is_available():
        faults.append("model.device: cuda was asked for, but torch finds none here")
    nodes = nodes_at_hand(config.run.cpu_threads, warn, local=in_process)
    placement = Placement(Share(1), Share(1), Share(1)) if in_process else attempt(lambda: place_for(config, nodes))
    raise_faults(faults)
    return prompts, placement, totals(nodes)


def run(
    opened: OpenRun, resources: dict[str, float], say: Say, complain: Say, own_reward: Reward | None = None
) -> None:
    """Train an opened run to its end, and close it. `complain` is told why it ends early, before what was started is
    stopped; then the RunFailure or KeyboardInterrupt is raised again."""
    records, config, begun = opened.records, opened.config, opened.checkpoint
    done = begun.manifest["next_epoch"] if begun else 0
    views, runner, status, reason = RunViews(records, config, say), None, "FAILED", None
    try:
        say(f"run directory: {records.storage}")
        if begun:
            say(f"going on from {begun.name}: {done} of {plural(config.train.epochs, 'epoch')} done")
        if records.about["finished"] and done >= config.train.epochs:
            say("nothing is left to do")
        elif config.train.stop_on_collapse and (signs := controller.collapsed(records)):
            say(f"stopped before: {signs} (train.stop_on_collapse=false goes on)")
        else:
            records.note(finished=False, failure=None, environment=environment.facts(), cluster=resources)
            views.open()
            if config.uncalibrated:
                views.say(f"sampler.kernel=calibrated: {calibration.DOING}")
                opened.settle(spread=measured_spread(config, views.say, views.progress, own_reward))
                views.settled(config := opened.config)
            if config.objective.window == "auto":
                opened.settle(settled=_settle(config, views, own_reward))
                views.settled(config := opened.config)
            if done < config.train.epochs:
                say(f"starting {'in process' if config.run.runner == 'inprocess' else 'on Ray'}: loading the model")
                runner = _start(opened, views, own_reward)
                if begun and runner.snapshot.sha256 != begun.manifest["adapter_sha256"]:
                    raise CheckpointError(f"{begun.name}: the adapter restored is not the one that was saved")
                judge = functools.partial(collapse.judge, records, config, lambda scores: png(contact_sheet(scores)))
                controller.run(opened, runner, judge, views)
        controller.finish(records, views)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        complain(f"interrupted; the same command goes on from what is done in {records.storage}")
        raise
    except (Exception, SystemExit, GeneratorExit) as raised:  # whoever asks to leave: the driver's status is its own
        error = raised if isinstance(raised, Exception) else RunFailure(f"{type(raised).__name__} was raised: {raised}")
        reason = short(f"{type(error).__name__}: {error}")
        with contextlib.suppress(StorageError):  # that may be the very reason
            records.note(failure=type(error).__name__)
            records.storage.write(TRACEBACK, "".join(traceback.format_exception(raised)).encode(errors="replace"))
        if isinstance(error, RunFailure | ConfigError):
            way_on = f"the same command goes on, once that is mended, from what is done in {records.storage}"
            way_on += f", where {TRACEBACK} says more"
            complain(f"{reason}; {way_on}")
        if error is raised:
            raise
        raise error from raised
    finally:
        signals.enter("closing")
        if runner is not None:
            runner.close()
        views.close(status, reason)
        opened.close()


def pools_for(config: Config, say: Say, own_reward: Reward | None = None) -> Pools:
    """That sample and score without a learner; raises what their start does."""
    reward = UserReward(config.reward.name, own_reward) if own_reward else None
    if config.run.runner == "inprocess":
        return InProcessPools(config, reward)
    from actors.rollouts import evaluation_pools

    with _sending(reward):
        return evaluation_pools(config, say, reward)


def measured_spread(
    config: Config, say: Say, progress: Callable[[str, int, int], None], own_reward: Reward | None = None
) -> list[float]:
    """sampler.spread of this config, as evaluation/calibration.py's `measure`."""
    wanted = calibration.pictures(config, training_prompts(config))
    with contextlib.closing(pools_for(wanted.config, say, own_reward)) as pools:
        return calibration.measure(wanted, pools, progress)


def settled_profile(
    config: Config, cache: Cache, say: Say, progress: Callable[[str, int, int], None], own_reward: Reward | None = None
) -> list[dict[str, float]]:
    """Where the reward of this config is settled, as evaluation/settling.py's `measure`; sampler.spread comes first."""
    if config.uncalibrated:
        found = {"spread": tuple(measured_spread(config, say, progress, own_reward))}
        config = config.model_copy(update={"sampler": config.sampler.model_copy(update=found)})
    wanted = settling.continuations(config, training_prompts(config))
    with contextlib.ExitStack() as stack:

        def pools() -> Pools:
            started = pools_for(wanted.config, say, own_reward)
            stack.callback(started.close)
            return started

        return settling.measure(wanted, cache, pools, progress)


def _settle(config: Config, views: RunViews, own_reward: Reward | None) -> dict[str, Any]:
    """What objective.window=auto is, for run.json. A function's code cannot be told from others': it is not kept."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory())) if own_reward else None
        views.say(f"objective.window=auto: {settling.DOING}")
        profile = settled_profile(config, Cache(folder), views.say, views.progress, own_reward)
    for line in settling.table(profile, config.objective.window_share):
        views.say(f"  {line}")
    window = settling.window(profile, config.objective.window_share)
    return {"window": [*window], "steps": config.sampler.steps, "profile": profile}


def _start(opened: OpenRun, views: RunViews, own_reward: Reward | None) -> Runner:
    config, begun, records = opened.as_begun, opened.checkpoint, opened.records

    def last_files() -> dict[str, bytes] | None:
        newest = checkpoint.load_newest(records.storage, records.run_id, lambda text: views.say(f"warning: {text}"))
        return newest.files if newest else None

    files, hooks = begun.files if begun else None, Hooks(views.event, views.progress, views.turn, last_files)
    reward = UserReward(config.reward.name, own_reward) if own_reward else None
    if config.run.runner == "inprocess":
        return InProcessRunner(config, files, hooks, reward)
    from actors.ray_runner import RayRunner  # here: a run in process needs no Ray

    with _sending(reward):
        return RayRunner(config, files, hooks, records.about["name"], reward)


@contextlib.contextmanager
def _sending(reward: UserReward | None) -> Iterator[None]:
    """Raises an UnknownReward where what is done within cannot send it to the actors."""
    try:
        yield
    except TypeError as error:
        if reward is None or "serialize" not in str(error):
            raise
        way = f"({error.__cause__}); put it into a file, as module:function, or use run.runner=inprocess"
        raise UnknownReward(f"reward {reward.name} cannot be sent to the reward actors {way}") from error
