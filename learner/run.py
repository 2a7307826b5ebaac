"""The main job: `python -m learner.run [--config FILE] [section.key=value ...]`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import rewards
from cluster.placement import PlacementError
from cluster.waits import ActorDied, DeadlineExceeded
from diffusion.base_model import BaseModelError, load_kernel
from learner import controller
from learner.config import DEFAULT_CONFIG, Config, ConfigError, known_keys, load_config, resolve
from learner.records import RunDirectory
from learner.runner import Runner
from learner.update import NonFiniteGradient, StaleWeights
from learner.work import read_prompts
from rewards.scorer import BadReward

# What can end a run that had started well: said in one line, without a traceback. Anything else is a defect.
FAILURES = (
    BadReward, StaleWeights, NonFiniteGradient, DeadlineExceeded, ActorDied, PlacementError, BaseModelError,
    ConnectionError,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: done; 2: bad input, said in one message before anything starts; 1: the run failed; 130: Ctrl-C."""
    args = _parser().parse_intermixed_args(arguments)
    try:
        config = load_config(args.config, args.overrides)
        _check_inputs(config)
        directory = RunDirectory(_run_path(config, args.config or DEFAULT_CONFIG), config)
    except (ConfigError, BaseModelError) as error:
        for line in str(error).splitlines():
            print(f"learner.run: {line}", file=sys.stderr)
        return 2
    print(f"run directory: {directory.path.resolve()}", flush=True)
    runner = None
    try:
        runner = build_runner(config)
        controller.run(config, runner, directory, say=lambda text: print(text, flush=True))
    except FAILURES as error:
        print(f"learner.run: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"learner.run: interrupted; what was done is in {directory.path.resolve()}", file=sys.stderr)
        return 130
    finally:
        if runner is not None:
            runner.close()
    return 0


def build_runner(config: Config) -> Runner:
    if config.run.runner == "inprocess":
        from learner.inprocess import InProcessRunner

        return InProcessRunner(config)
    from actors.ray_runner import RayRunner

    return RayRunner(config)


def _check_inputs(config: Config) -> None:
    """Files and names that would otherwise fail only after actors are up."""
    prompts = read_prompts(config.prompts.path)
    if config.evaluation.prompts:
        prompts += read_prompts(config.evaluation.prompts, "evaluation.prompts")
    try:
        load_kernel(str(resolve(config.model.path)), config.sampler.steps, config.sampler.eta)
    except BaseModelError:
        raise
    except ValueError as error:
        raise ConfigError(f"sampler.steps: {error}") from error
    if config.model.device == "cuda" and config.run.runner == "inprocess" and not torch.cuda.is_available():
        raise ConfigError("model.device: cuda was asked for, but torch finds none here")
    try:
        rewards.check(config.reward.name, config.reward.weights, config.reward.options, prompts)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _run_path(config: Config, source: Path) -> Path:
    if config.run.dir:
        return Path(config.run.dir).expanduser()
    return Path("runs") / f"{source.stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _parser() -> argparse.ArgumentParser:
    keys = "\n".join(
        f"  {key:<30} {field.description} (default: {field.get_default(call_default_factory=True)})"
        for key, field in known_keys().items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m learner.run",
        description="Post-train a text-to-image diffusion model with a GFlowNet objective.",
        epilog=f"keys (defaults are the papers'; a bare command runs {DEFAULT_CONFIG.name}, which sets many):\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help=f"YAML preset (default: {DEFAULT_CONFIG.name})")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the preset's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
