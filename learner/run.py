"""The main job: `python -m learner.run [--config FILE] [section.key=value ...]`. Imports neither torch nor Ray before
the settings are sound. The job is learner/api.py."""

if __name__ == "__main__":
    from learner.__main__ import enter

    enter("run")  # signals are watched from here on, before seconds of imports

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from cluster import signals
from commands import outcome
from diffusion.failures import RunFailure
from diffusion.locate import countable, is_unconditional, locate
from learner import prompts
from learner.config import (
    DEFAULT_CONFIG,
    Config,
    ConfigError,
    config_yaml,
    known_keys,
    raise_faults,
    read_config,
    settled,
)
from learner.config.checks import untrainable
from learner.config.load import resolve
from rewards import registry

complain = partial(outcome.complain, "run")


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: done; 2: bad input, said in full before anything starts; 1: the run failed; 130: Ctrl-C;
    143: SIGTERM."""
    args = (parser := _parser()).parse_intermixed_args(arguments)
    if (args.tflops or args.measure or args.gpu_memory) and not args.plan:
        parser.error("--tflops, --measure and --gpu-memory go with --plan")
    source, opened, warn = args.config or DEFAULT_CONFIG, None, outcome.warner("run")
    signals.enter("running")
    try:
        config, faults = read_config(source, args.overrides)
        if args.print_config:
            raise_faults(faults)
            print(config_yaml(config).decode(), end="")
            return 0
        config = prompts.countable(config, warn) if args.plan else config
        raise_faults([*faults, *_faults_seen_at_once(config)])

        from learner import trial  # here: it imports torch, and no more

        counted = countable(str(resolve(config.model.path))) if args.plan else None
        if args.try_reward or (config.reward.try_first and not args.plan):
            raise_faults(trial.faults(config, whole=args.try_reward, path=counted))

        from learner import api, open_run
        from records import facts
        from records.run_folder import Records

        texts, placement, resources = api.check(config, warn, counted=counted)
        if args.plan:
            from commands import plan

            storage = open_run.find(config, source, texts)
            known = facts.there(storage)
            config = settled(config, Records.open(storage)) if known else config
            place = f"{storage}, {'going on' if known else 'new'}"
            asked = args.tflops, args.measure, args.gpu_memory
            print(plan.describe(config, placement, resources, place, counted, *asked))
            return 0
        opened = open_run.open_run(config, source, texts, warn)
        api.run(opened, resources, say, complain)
        return 0
    except (ConfigError, RunFailure) as error:
        if opened:  # it has been said
            return 1
        for line in str(error).splitlines():
            complain(line)
        return 2
    except KeyboardInterrupt:
        if not opened:
            complain("interrupted before anything was started")
        return signals.status()


def _faults_seen_at_once(config: Config) -> list[str]:
    """What can be found to be wrong without torch: prompt files, the model's kind, a reward of no known name."""
    read = partial(prompts.training_prompts, config), partial(prompts.evaluation_prompts, config)
    reward = partial(registry.check_name, config.reward.name)
    faults, path = [*untrainable(config)], str(resolve(config.model.path))
    look = is_unconditional if Path(path).is_dir() else locate  # no hub is asked yet
    for step in (*read, partial(look, path), reward):
        try:
            step()
        except ValueError as error:
            faults.append(str(error))
    return faults


def say(text: str) -> None:
    """Print, with what the terminal's encoding lacks escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    outcome.tell(text.encode(encoding, "backslashreplace").decode(encoding), sys.stdout)


def _parser() -> argparse.ArgumentParser:
    keys = "\n".join(
        f"  {key:<30} {_kind(field.annotation):<12} {field.description} (default: {field.default})"
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
    parser.add_argument("--tflops", type=_positive, metavar="N", help="with --plan: hours, if a device reaches so much")
    parser.add_argument("--measure", action="store_true", help="with --plan: hours, by timing the parts here")
    parser.add_argument(
        "--gpu-memory", type=_positive, metavar="GB", help="with --plan: what fits into such a GPU (default: one found)"
    )
    parser.add_argument("--try-reward", action="store_true", help="call all rewards once, also with --plan")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the preset's")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _kind(annotation: Any) -> str:
    """Name of a key's type: int, float, str, bool, list, dict, choice; `|none` where it may be left out."""
    origin = get_origin(annotation)
    if origin in (Literal, tuple, dict):
        return {Literal: "choice", tuple: "list", dict: "dict"}[origin]
    parts = map(_kind, get_args(annotation))
    return "|".join(parts) or {type(None): "none"}.get(annotation, getattr(annotation, "__name__", str(annotation)))
