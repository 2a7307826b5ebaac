"""The main job: `python -m learner.run [--config FILE] [section.key=value ...]`."""

from __future__ import annotations

import argparse
import sys

from cluster import signals

if __name__ == "__main__":
    signals.watch()  # now: what follows takes seconds to import

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from cluster.nodes import totals
from cluster.placement import Placement, PlacementError, Share, place_for
from cluster.session import nodes_at_hand
from cluster.waits import ActorDied, DeadlineExceeded, ObjectLost
from diffusion.gpu_memory import OutOfMemory
from diffusion.loading import check_parts, check_tiny_decoder, load_kernel
from diffusion.locate import BaseModelError, is_unconditional
from learner import controller, open_run
from learner.config import DEFAULT_CONFIG, Config, ConfigError, known_keys, read_config, resolve
from learner.open_run import OpenRun
from learner.process_group import GroupBroken
from learner.protocol.buffer import TooStale
from learner.protocol.ledger import LedgerError
from learner.protocol.quarantine import QuarantineFull
from learner.protocol.receipts import RanksDiverged, StaleWeights
from learner.protocol.runner import Hooks, Runner
from learner.update import NonFiniteGradient
from records import environment
from records.checkpoint import CheckpointError
from records.heartbeat import Heartbeat
from records.storage import Storage, StorageError
from reports.tracking import Tracker, tracking_uri
from rewards import judges, registry
from rewards.registry import UnknownReward
from rewards.scorer import BadReward
from rewards.weights import BadWeights, WeightsNotFound

# What can end a run that had started well: said in one line, without a traceback. Anything else is a defect.
FAILURES = (
    BadReward, QuarantineFull, UnknownReward, BadWeights, WeightsNotFound, StaleWeights, TooStale, RanksDiverged,
    NonFiniteGradient, GroupBroken, LedgerError, CheckpointError, StorageError, OutOfMemory, DeadlineExceeded,
    ActorDied, ObjectLost, PlacementError, BaseModelError, ConnectionError,
)  # fmt: skip
ENDS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}  # as MLflow says it, and status.json


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: done; 2: bad input, said in full before anything starts; 1: the run failed; 130: Ctrl-C;
    143: SIGTERM."""
    args = _parser().parse_intermixed_args(arguments)
    source = args.config or DEFAULT_CONFIG
    signals.running()
    try:
        config, faults = read_config(source, args.overrides)
        if args.print_config:
            _raise(faults)
            print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
            return 0
        placement, resources = _check(config, faults)
        prompts = [*controller.training_prompts(config), *controller.evaluation_prompts(config)]
        if args.plan:
            from commands import plan

            print(plan.describe(config, placement, resources, open_run.whereabouts(config, source, prompts)))
            return 0
        opened = open_run.open_run(config, source, prompts, warn)
    except (ConfigError, CheckpointError, BaseModelError, ConnectionError) as error:
        for line in str(error).splitlines():
            complain(line)
        return 2
    except KeyboardInterrupt:
        complain("interrupted before anything was started")
        return signals.status()
    try:
        return _run(opened, resources)
    finally:
        opened.close()


def _run(opened: OpenRun, resources: dict[str, float]) -> int:
    records, config = opened.records, opened.config
    runner: Runner | None = None
    tracker, heartbeat, status, reason = None, None, "FAILED", None
    try:
        say(f"run directory: {records.storage}")
        if opened.checkpoint:
            done = opened.epochs_done
            say(f"going on from {opened.checkpoint.name}: {done} of {config.train.epochs} epochs are done "
                "(run.resume=never with another run.dir starts afresh)")  # fmt: skip
        if records.about["finished"] and opened.epochs_done >= config.train.epochs:
            say("nothing is left to do")
            controller.finish(records, config, say)
            return 0
        if config.train.stop_on_collapse and (signs := controller.collapsed(records)):
            say(f"stopped before: {signs} (train.stop_on_collapse=false goes on)")
            controller.finish(records, config, say)
            return 0
        records.note(finished=False, environment=environment.facts(), cluster=resources)
        tracker = Tracker(records, config, say)
        heartbeat = _heartbeat(records.storage, config)
        if opened.epochs_done < config.train.epochs:
            files = opened.checkpoint.files if opened.checkpoint else None

            def start_runner(hooks: Hooks) -> Runner:
                nonlocal runner
                runner = build_runner(opened.as_begun, files, hooks, records.about["name"])
                return runner

            controller.run(opened, start_runner, tracker, heartbeat, say)
        controller.finish(records, config, say)
        status = "FINISHED"
        return 0
    except FAILURES as error:
        way_on = f"once that is mended, the same command goes on from what is done in {records.storage}"
        reason = f"{type(error).__name__}: {error}"
        complain(f"{reason} ({way_on})")
        return 1
    except KeyboardInterrupt:
        status = "KILLED"
        complain(f"interrupted; the same command goes on from what is done in {records.storage}")
        return signals.status()
    finally:
        signals.closing()
        if runner is not None:
            runner.close()
        if heartbeat is not None:
            heartbeat.end(ENDS[status], reason)
        if tracker is not None:
            tracker.finish(status)


def say(text: str) -> None:
    """Print; what the terminal's encoding lacks, a prompt's characters say, is escaped, not a reason to fail."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def complain(text: str) -> None:
    print(f"learner.run: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    complain(f"warning: {text}")


def _heartbeat(storage: Storage, config: Config) -> Heartbeat:
    ray = config.run.runner == "ray"
    uri = tracking_uri(config, storage) if config.mlflow.enabled else None
    return Heartbeat(storage, config.train.epochs, uri, config.run.ready_seconds if ray else config.run.train_seconds)


def build_runner(config: Config, files: dict[str, bytes] | None, hooks: Hooks, name: str) -> Runner:
    if config.run.runner == "inprocess":
        from learner.inprocess import InProcessRunner

        return InProcessRunner(config, files, hooks)
    from actors.ray_runner import RayRunner

    return RayRunner(config, files, hooks, name)


def _check(config: Config, faults: Sequence[str]) -> tuple[Placement, dict[str, float]]:
    """Everything that would otherwise fail only after actors are up; with `faults`, all is said at once.

    Raises:
        ConfigError: a line for each fault.
    """
    found = list(faults)

    def attempt(step: Callable[[], Any], prefix: str = "") -> Any:
        try:
            return step()
        except (BaseModelError, ConfigError, PlacementError) as error:
            found.append(str(error))
        except ValueError as error:
            found.append(f"{prefix}{error}")
        return None

    prompts = attempt(lambda: controller.training_prompts(config)) or []
    if config.evaluation.prompts:
        prompts = prompts + (attempt(lambda: controller.evaluation_prompts(config)) or [])
    path = str(resolve(config.model.path))
    sampler = config.sampler
    if attempt(lambda: is_unconditional(path)) is not None:  # there is a pipeline
        attempt(lambda: check_parts(path))
        attempt(lambda: _check_prompting(config, path))
        attempt(lambda: load_kernel(path, sampler.steps, sampler.eta, sampler.grid), "sampler.steps: ")
        if config.objective.forward_looking_decoder == "tiny":
            attempt(lambda: check_tiny_decoder(str(resolve(config.model.tiny_decoder)), path))
    reward = config.reward
    objective = _needing_gradients(config)
    attempt(
        lambda: registry.check(reward.name, reward.weights, reward.options, prompts, objective, reward.backend)
    )  # fmt: skip
    evaluation = config.evaluation
    attempt(lambda: judges.check(evaluation.held_out, evaluation.features, evaluation.clip, prompts))
    if config.run.runner == "inprocess":
        if config.model.device == "cuda" and not torch.cuda.is_available():
            found.append("model.device: cuda was asked for, but torch finds none here")
        _raise(found)
        return Placement(Share(1), Share(1), Share(1)), totals(nodes_at_hand(config.run.cpu_threads, warn, local=True))
    nodes = nodes_at_hand(config.run.cpu_threads, warn)
    placement = attempt(lambda: place_for(config, nodes))
    _raise(found)
    return placement, totals(nodes)


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


def _needing_gradients(config: Config) -> str | None:
    """The objective, if it learns from reward gradients."""
    return config.objective.kind if config.needs.reward_gradients else None


def _raise(faults: Sequence[str]) -> None:
    if faults:
        raise ConfigError("\n".join(faults))


def _parser() -> argparse.ArgumentParser:
    keys = "\n".join(
        f"  {key:<30} {_kind(field.annotation):<12} {field.description} "
        f"(default: {field.get_default(call_default_factory=True)})"
        for key, field in known_keys().items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m learner.run",
        description="Post-train a text-to-image diffusion model with a GFlowNet objective.",
        epilog=f"keys (defaults are the papers'; a bare command runs {DEFAULT_CONFIG.name}, which sets many):\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help=f"YAML preset (default: {DEFAULT_CONFIG.name})")
    parser.add_argument("--print-config", action="store_true", help="print every setting as YAML, and stop")
    parser.add_argument("--plan", action="store_true", help="print what would run where and what it costs, and stop")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the preset's")
    return parser


def _kind(annotation: Any) -> str:
    """Name of a key's type: int, float, str, bool, list, dict; `|none` where it may be left out."""
    text = str(getattr(annotation, "__name__", annotation)) if isinstance(annotation, type) else str(annotation)
    for word, name in (("Literal", "choice"), ("tuple", "list"), ("dict", "dict")):
        if word in text:
            return name
    return text.replace(" | None", "|none")


if __name__ == "__main__":
    signals.leave(main())
