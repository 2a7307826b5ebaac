"""Speed and memory of every part on one device, without Ray, beside plain diffusers and the published algorithm.

    python -m benchmarks.device [--config configs/shapes_alignment.yaml] [--trajectories 32] [--repeats 3]
        [--objectives dag_db dag_kl] [--device cuda] [--output F.json] [key=value ...]
    python -m benchmarks.device --sd15 [...]     Stable Diffusion 1.5's size with random weights, made on the spot

docs/performance.md says what each figure means. Exit status 2: bad input, said in one line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

import torch

from benchmarks import parts as names
from benchmarks import pipelines
from benchmarks.measure import CEILING, Measured, measure, process_peak_bytes, processor, ratio
from benchmarks.parts import COMPARISON, Bench, objective_configs, with_settings
from diffusion.locate import BaseModelError
from learner import build
from learner.config import DEFAULT_CONFIG, ConfigError, resolve
from learner.objectives.by_name import OBJECTIVES
from records import environment
from rewards.registry import UnknownReward

SD15 = Path(__file__).parent / "sd15.yaml"
LATE = 0.8  # cheap forward-looking values begin after this share of the steps, where the config has no say
# Seconds of the first over seconds of the second: above 1 the second is faster.
RATIOS = {
    "rollout (snapshot) against the diffusers pipeline": ([names.PIPELINE], [names.ROLLOUT]),
    "learner against the published one": ([names.PUBLISHED_LEARN], [names.LEARN]),
    "whole epoch, forward_looking=snapshot": (
        [names.PUBLISHED_SAMPLE, names.PUBLISHED_LEARN], [names.ROLLOUT, names.SCORE, names.LEARN],
    ),
    "whole epoch, forward_looking=base": (
        [names.PUBLISHED_SAMPLE, names.PUBLISHED_LEARN], [names.ROLLOUT_BASE, names.SCORE, names.LEARN],
    ),
    "whole epoch, late forward-looking values only": (
        [names.PUBLISHED_SAMPLE, names.PUBLISHED_LEARN], [names.ROLLOUT, names.SCORE_CHEAP, names.LEARN],
    ),
    "whole epoch, inner states by the tiny decoder": (
        [names.PUBLISHED_SAMPLE, names.PUBLISHED_LEARN], [names.ROLLOUT, names.SCORE_TINY, names.LEARN],
    ),
    "whole epoch, half of the transitions": (
        [names.PUBLISHED_SAMPLE, names.PUBLISHED_LEARN], [names.ROLLOUT, names.SCORE_HALF, names.LEARN_HALF],
    ),
    "whole epoch, half of the transitions, tiny decoder": (
        [names.PUBLISHED_SAMPLE, names.PUBLISHED_LEARN], [names.ROLLOUT, names.SCORE_HALF_TINY, names.LEARN_HALF],
    ),
}  # fmt: skip


class BadArguments(ValueError):
    """In one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadArguments(message)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        args = parsed(arguments)
        with tempfile.TemporaryDirectory() as folder:
            report = run(args, Path(folder))
    except (BadArguments, ConfigError, BaseModelError, UnknownReward) as error:
        print(f"benchmarks.device: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    print(table(report))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises BadArguments."""
    args = _parser().parse_intermixed_args(arguments)
    _check(args)
    return args


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure, and return the report as JSON types. `folder` is for a pipeline made on the spot.

    Raises:
        BadArguments, ConfigError, BaseModelError, UnknownReward: see there; nothing was measured.
    """
    path, overrides, cheap, tiny = _settings(args, folder)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    config = with_settings(path, overrides, *COMPARISON)
    if args.sd15:
        _say("making a pipeline with random weights")
        pipelines.build(folder, args.sd15 == "tiny", build.device(config))
        pipelines.build_tiny_decoder(folder / "taesd", args.sd15 == "tiny")
    try:
        bench = Bench(config, cheap, tiny)
    except ConfigError:
        raise
    except ValueError as error:  # a reward's options, a grid without variance
        raise BadArguments(str(error)) from error
    kinds = list(OBJECTIVES) if args.objectives is None else args.objectives
    configs, missing = objective_configs(path, overrides, kinds, bench.scorer.reward.differentiable)
    if args.objectives and missing:
        raise BadArguments("; ".join(f"{name}: {why}" for name, why in missing.items()))
    _say("sampling and scoring what the learners learn from")
    end = time.monotonic() + args.seconds
    found, left_out = measure(
        bench.parts(configs), args.repeats, bench.model.device, _say, lambda: end - time.monotonic()
    )
    return _report(args, bench, found, missing | left_out)


def _check(args: argparse.Namespace) -> None:
    if args.objectives is not None:
        args.overrides += [one for one in args.objectives if "=" in one]
        args.objectives = [one for one in args.objectives if "=" not in one and one != "none"]
    for kind in args.objectives or ():
        if kind not in OBJECTIVES:
            raise BadArguments(f"--objectives: there is no {kind!r}; known: {', '.join(OBJECTIVES)}")
    if args.repeats < 1:
        raise BadArguments(f"--repeats: must be at least 1, got {args.repeats}")
    if args.output and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
        raise BadArguments(f"--output: {args.output} cannot be written: name a file in a folder that exists")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadArguments("--device: cuda was asked for, but torch finds none here")


def _settings(args: argparse.Namespace, folder: Path) -> tuple[Path, list[str], int, str | None]:
    """Config file, overrides, the step from which late forward-looking values begin, and the tiny decoder if the config
    has one in use."""
    path = args.config or (SD15 if args.sd15 else DEFAULT_CONFIG)
    overrides = list(args.overrides)
    if args.device:
        overrides.append(f"model.device={args.device}")
    if args.sd15:
        overrides += [f"model.path={folder}", f"model.tiny_decoder={folder / 'taesd'}"]
    count = args.trajectories
    if count is None:  # the least that the config can do
        given = with_settings(path, overrides)
        count = given.sampler.chunk_size * given.train.updates_per_epoch
    overrides.append(f"train.trajectories={count}")
    config = with_settings(path, overrides)
    steps, cheap = config.sampler.steps, args.cheap_from
    if cheap is None:
        cheap = config.objective.forward_looking_from or round(LATE * steps)
    if not 0 < cheap <= steps:
        raise BadArguments(f"--cheap-from: must be in 1..{steps} (sampler.steps), got {cheap}")
    use = config.objective.forward_looking_decoder == "tiny"
    return path, overrides, cheap, str(resolve(config.model.tiny_decoder)) if use else None


def _report(
    args: argparse.Namespace, bench: Bench, found: dict[str, Measured], missing: dict[str, str]
) -> dict[str, Any]:
    ceilings = {one.part.dtype: one.flops / median(one.seconds)
                for name, one in found.items() if name.startswith(CEILING)}  # fmt: skip
    ratios = {name: ratio(found, above, below) for name, (above, below) in RATIOS.items()}
    facts = environment.facts()
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "hardware": {
            "device": bench.model.device.type, "gpu": facts["gpu"] if bench.model.device.type == "cuda" else "",
            "cpu": processor(), "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
        },
        "versions": {name: facts[name] for name in (*environment.PACKAGES, "python")},
        "git_commit": facts["git_commit"],
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "convolution": torch.backends.cudnn.allow_tf32},
        "model": f"Stable Diffusion 1.5, {args.sd15}, random weights" if args.sd15 else bench.config.model.path,
        "trajectories": len(bench.prompts),
        "repeats": args.repeats,
        "cheap_from": bench.cheap_from,
        "compared_config": bench.config.flat(),
        "objective_configs": bench.changes,
        "parts": {name: one.figures(ceilings.get(one.part.dtype)) for name, one in found.items()},
        "ratios": {name: one for name, one in ratios.items() if one},
        "not_measured": missing,
        "process_peak_bytes": process_peak_bytes(),
    }  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """The report in columns; what was not measured is said below."""
    hardware, commit = report["hardware"], report["git_commit"]
    place = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
    steps, changed = report["compared_config"]["sampler.steps"], "+" * commit.endswith("+")
    lines = [
        f"{report['date']}  {place}, torch {report['versions']['torch']}, commit {commit[:12]}{changed}",
        f"{report['model']}: {report['trajectories']} trajectories of {steps} steps, {report['repeats']} rounds",
        "",
        f"{'part':<28}{'rate (median)':>24}{'seconds: all rounds':>34}{'TFLOP/s':>10}{'of ceiling':>12}"
        f"{'peak GB':>9}{'own GB':>9}",
    ]
    for name, part in report["parts"].items():
        seconds = " ".join(f"{one:.3g}" for one in part["seconds"])
        achieved = f"{part['flops_per_second'] / 1e12:.3g}" if "flops" in part else ""
        share = f"{part['of_ceiling']:.0%}" if "of_ceiling" in part else ""
        peak = own = ""
        if "peak_bytes" in part:
            peak, own = f"{part['peak_bytes'] / 1e9:.2f}", f"{(part['peak_bytes'] - part['resident_bytes']) / 1e9:.2f}"
        rate = "" if name.startswith(CEILING) else f"{part['rate']:.4g} {part['unit']}/s"
        lines.append(f"{name:<28}{rate:>24}{seconds:>34}{achieved:>10}{share:>12}{peak:>9}{own:>9}".rstrip())
    lines += ["", f"{'times as fast':<56}{'median':>8}   {'all rounds':<24}{'by FLOPs':>9}"]
    for name, one in report["ratios"].items():
        each = " ".join(f"{value:.2f}" for value in one["each"])
        ideal = f"{one['of_flops']:.2f}" if "of_flops" in one else ""
        lines.append(f"{name:<56}{one['median']:>8.2f}   {each:<24}{ideal:>9}")
    peak = report["process_peak_bytes"] / 1e9
    lines += [
        "",
        f"late forward-looking values: from step {report['cheap_from']}",
        f"main memory: {peak:.2f} GB at the most, of the whole process with all parts in it",
    ]
    lines += [f"not measured: {name}: {why}" for name, why in report["not_measured"].items()]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help=f"YAML preset (default: {DEFAULT_CONFIG.name})")
    parser.add_argument(
        "--sd15", nargs="?", const="full", choices=("full", "tiny"),
        help="a pipeline with random weights of that size, or with the same classes tiny; preset benchmarks/sd15.yaml",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the config's")
    parser.add_argument("--tf32", action="store_true", help="float32 products and convolutions in TF32, on both sides")
    parser.add_argument("--trajectories", type=int, help="of one epoch (default: one chunk an update)")
    parser.add_argument(
        "--objectives", nargs="+", help="whose learner is measured, or none (default: all that config and reward allow)"
    )
    parser.add_argument(
        "--cheap-from", type=int, metavar="STEP",
        help="first step with a forward-looking value, where only late ones are measured (default: "
        f"objective.forward_looking_from, else {LATE} of the steps)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3, help="rounds measured (default: 3)")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="of measuring, after which no round but the first is begun"
    )
    parser.add_argument("--output", type=Path, help="JSON file of every figure with its repeats")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the preset's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
