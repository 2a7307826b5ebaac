"""The job: everything is checked, then a run is trained to its end and closed, whatever happens.

The composition root: here the epoch loop meets its runner, its records and its views.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cluster import signals
from cluster.nodes import totals
from cluster.placement import Placement, Share, place_for
from cluster.session import nodes_at_hand
from diffusion.failures import RunFailure
from diffusion.loading import check_parts, check_tiny_decoder, load_kernel
from diffusion.locate import is_unconditional
from evaluation import collapse
from learner import controller
from learner.config import Config, ConfigError, resolve
from learner.open_run import OpenRun
from learner.prompts import evaluation_prompts, training_prompts
from learner.protocol.runner import Hooks, Runner
from records import environment
from records.checkpoint import CheckpointError
from reports.pictures import contact_sheet, png
from reports.views import RunViews
from rewards import judges, registry
from rewards.registry import Reward

Say = Callable[[str], None]


def check(
    config: Config, warn: Say, own_reward: Callable[..., Any] | None = None
) -> tuple[Placement, dict[str, float]]:
    """Everything that would otherwise fail only after actors are up, all of it said at once: what would run where, and
    the cluster's resources. `own_reward`: a function in place of the reward that the config names.

    Raises:
        ConfigError: a line for each fault.
        ClusterUnreachable: see there.
    """
    faults: list[str] = []

    def attempt(step: Callable[[], Any], prefix: str = "") -> Any:
        try:
            return step()
        except RunFailure as error:
            faults.append(str(error))
        except ValueError as error:
            faults.append(str(error) if isinstance(error, ConfigError) else f"{prefix}{error}")
        return None

    sampler, reward, evaluation = config.sampler, config.reward, config.evaluation
    prompts = [*training_prompts(config), *(evaluation_prompts(config) if evaluation.prompts else [])]
    path = str(resolve(config.model.path))
    if attempt(lambda: is_unconditional(path)) is not None:  # there is a pipeline
        attempt(lambda: check_parts(path))
        attempt(lambda: _check_prompting(config, path))
        attempt(lambda: load_kernel(path, sampler.steps, sampler.eta, sampler.grid), "sampler.steps: ")
        if config.objective.forward_looking_decoder == "tiny":
            attempt(lambda: check_tiny_decoder(str(resolve(config.model.tiny_decoder)), path))
    needing = config.objective.kind if config.needs.reward_gradients else None
    if own_reward:
        attempt(lambda: registry.check_gradient(own_reward, reward.name, needing))
    else:
        attempt(lambda: registry.check(reward.name, reward.weights, reward.options, prompts, needing, reward.backend))
    attempt(lambda: judges.check(evaluation.held_out, evaluation.features, evaluation.clip, prompts))
    if config.run.runner == "inprocess":
        if config.model.device == "cuda" and not torch.cuda.is_available():
            faults.append("model.device: cuda was asked for, but torch finds none here")
        _raise(faults)
        return Placement(Share(1), Share(1), Share(1)), totals(nodes_at_hand(config.run.cpu_threads, warn, local=True))
    nodes = nodes_at_hand(config.run.cpu_threads, warn)
    placement = attempt(lambda: place_for(config, nodes))
    _raise(faults)
    return placement, totals(nodes)


def run(
    opened: OpenRun, resources: dict[str, float], say: Say, complain: Say = lambda text: None,
    own_reward: Reward | None = None,
) -> None:  # fmt: skip
    """Train an opened run to its end. `complain` is told why it ends early, before what was started is stopped.

    Raises:
        RunFailure: see there; the same run can be gone on with.
        KeyboardInterrupt: the same.
    """
    records, config = opened.records, opened.config
    views = RunViews(records, config, say)
    runner, status, reason = None, "FAILED", None
    try:
        say(f"run directory: {records.storage}")
        if opened.checkpoint:
            done = opened.epochs_done
            say(f"going on from {opened.checkpoint.name}: {done} of {config.train.epochs} epochs are done "
                "(run.resume=never with another run.dir starts afresh)")  # fmt: skip
        if records.about["finished"] and opened.epochs_done >= config.train.epochs:
            say("nothing is left to do")
            controller.finish(records, views)
            return
        if config.train.stop_on_collapse and (signs := controller.collapsed(records)):
            say(f"stopped before: {signs} (train.stop_on_collapse=false goes on)")
            controller.finish(records, views)
            return
        records.note(finished=False, environment=environment.facts(), cluster=resources)
        views.open()
        if opened.epochs_done < config.train.epochs:
            files = opened.checkpoint.files if opened.checkpoint else None
            hooks = Hooks(views.event, views.progress, views.turn, partial(controller.last_files, records, views.say))
            runner = build_runner(opened.as_begun, files, hooks, records.about["name"], own_reward)
            if opened.checkpoint and runner.snapshot.sha256 != opened.checkpoint.manifest["adapter_sha256"]:
                raise CheckpointError(f"{opened.checkpoint.name}: the adapter restored is not the one that was saved")
            pixels = config.run.thumbnail_pixels
            judge = partial(collapse.judge, records, pixels, lambda scores: png(contact_sheet(scores)))
            controller.run(opened, runner, judge, views)
        controller.finish(records, views)
        status = "FINISHED"
    except RunFailure as error:
        reason = f"{type(error).__name__}: {error}"
        complain(f"{reason} (once that is mended, the same command goes on from what is done in {records.storage})")
        raise
    except KeyboardInterrupt:
        status = "KILLED"
        complain(f"interrupted; the same command goes on from what is done in {records.storage}")
        raise
    finally:
        signals.closing()
        if runner is not None:
            runner.close()
        views.close(status, reason)


def build_runner(
    config: Config, files: dict[str, bytes] | None, hooks: Hooks, name: str, own_reward: Reward | None = None
) -> Runner:
    if config.run.runner == "inprocess":
        from learner.inprocess import InProcessRunner

        return InProcessRunner(config, files, hooks, own_reward)
    from actors.ray_runner import RayRunner

    return RayRunner(config, files, hooks, name, own_reward)


def _check_prompting(config: Config, path: str) -> None:
    """
    Raises:
        ConfigError: prompts or guidance for a model that takes none, or none for one that does.
    """
    faults = []
    if is_unconditional(path):
        if config.prompts.path is not None or config.evaluation.prompts is not None:
            faults.append(f"prompts.path, evaluation.prompts: {path} takes no prompts; set prompts.path=null")
        if config.sampler.guidance != 1:
            faults.append(f"sampler.guidance: {path} takes no prompts, so there is nothing to guide; set it to 1")
    elif config.prompts.path is None:
        faults.append(f"prompts.path: {path} takes prompts; name a file of them")
    _raise(faults)


def _raise(faults: list[str]) -> None:
    if faults:
        raise ConfigError("\n".join(faults))
