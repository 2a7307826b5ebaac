"""Judges finished adapters beside their base model: `python -m learner.evaluate RUN_OR_LORA... [key=value ...]`.

A RUN is a run's folder or URL (its newest checkpoint, or --step); a LORA a .safetensors file or the folder it is in.
What is written, RUN/evaluation/step-NNNNNN-N-images-KEY.json, .parquet and .png (of a LoRA: into --out), is in
docs/evaluation.md; KEY tells judgements by other settings apart.
Stopped? The same command goes on: finished chunks are kept (evaluation/image_sets.py).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cluster import signals
from commands import report
from commands.outcome import attempt, complain, require_writable, warner
from diffusion.failures import RunFailure
from evaluation import certificate, image_sets
from evaluation.adapters import OTHER_SEED, Target, find, split
from evaluation.image_sets import Cache, Pools
from learner.config import DEFAULT_CONFIG, Config, ConfigError, saved_config
from records.heartbeat import REPORT
from records.run_folder import Records
from records.words import printable, short
from reports import summary, targets
from reports.progress import Bar

UPLOAD_SECONDS = 120
Result = TypeVar("Result")


@dataclass(frozen=True)
class Judged:
    """The result for one adapter: the figures (image_sets.compare, with what they are of), the sets' Parquet files."""

    target: Target
    figures: dict[str, Any]
    sets: dict[str, bytes]


def judge(targets: Sequence[Target], cache: Cache) -> list[Judged]:
    """Judge each, write its files, and print its table. Raises what `draw` does, or writing."""
    return draw(targets, cache, _judge)


def _judge(target: Target, sets: dict[str, bytes]) -> tuple[Judged, str]:
    tuned, base, other = (image_sets.read_images(sets[name]) for name in ("tuned", "base", "other"))
    figures = facts(target) | image_sets.compare(tuned, base, other)
    figures |= certificate.judgement(tuned, [base.rewards, other.rewards], target.exponent, target.no_exponent)
    judged = Judged(target, figures, sets)
    _write(judged)
    return judged, table(judged)


def draw(
    targets: Sequence[Target], cache: Cache, judge: Callable[[Target, dict[str, bytes]], tuple[Result, str]]
) -> list[Result]:
    """What `judge` makes of each target's sets (Target.sets, as Parquet files); it also gives what is printed. Targets
    of one config share their actors, which are started when a picture is missing. Raises what sampling or scoring does;
    what is finished stays."""
    results = []
    with Bar() as bar:
        say = functools.partial(bar.around, functools.partial(print, flush=True))
        for config, alike in itertools.groupby(targets, key=lambda target: target.config):
            with contextlib.ExitStack() as stack:
                pools = functools.cache(functools.partial(_start, config, say, stack))
                for target in alike:
                    sets = {
                        name: cache.make(image_set, pools, functools.partial(bar.show, f"{target.name}, {name}"))
                        for name, image_set in target.sets().items()
                    }
                    result, text = judge(target, sets)
                    results.append(result)
                    say(text)
    return results


def _start(config: Config, say: Callable[[str], None], stack: contextlib.ExitStack) -> Pools:
    from learner.api import pools_for  # here: torch comes with it

    pools = pools_for(config, say)
    stack.callback(pools.close)
    say(pools.description)
    return pools


def table(judged: Judged) -> str:
    """The figures for a terminal."""
    config = judged.target.config
    settings = f"seed {config.evaluation.seed}, reward: {config.reward.name}, features: {config.evaluation.features}"
    lines = [f"{judged.target.name}: {config.evaluation.images} images, {settings}"]
    lines.append(f"{'':32}{'tuned':>9}  {'95 % interval':<23}{'base':>10}  {'noise alone, up to':<18}")
    for row in summary.rows(judged.figures):
        value, low, high, base, floor, most = (number(row[key]) for key in summary.NUMBERS[:6])
        name = short(printable(row["name"]), 60)
        lines.append(f"{name:32}{value:>9}  {f'[{low}, {high}]':<23}{base:>10}  {floor}, {most}")
    lines += [f"{summary.FIGURES[name][0]:32}{'-':>9}  {why}" for name, why in judged.figures["absent"].items()]
    lines += targets.of_certificate(judged.figures)
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Four figures, or a dash for what is not known."""
    return "-" if value is None else f"{value:.4g}"


def facts(target: Target) -> dict[str, Any]:
    evaluation = target.config.evaluation
    settings = evaluation.model_dump(include={"images", "seed", "features"})
    settings |= target.config.sampler.model_dump(include={"steps", "guidance", "eta", "grid", "kernel"})
    settings |= {"noise_steps": target.config.noise_steps}
    settings |= {"prompts": len(set(target.prompts[: evaluation.images])), "other_seed": evaluation.seed + OTHER_SEED}
    return {
        "format": image_sets.FORMAT, "name": target.name, "adapter_sha256": target.adapter.sha256, **target.facts,
        "base_model": target.config.model.path, "reward_name": target.config.reward.name, "settings": settings,
    }  # fmt: skip


def _write(judged: Judged) -> None:
    """The figures last: where they are, the rest is."""
    from reports import pictures

    target, sets = judged.target, judged.sets
    target.out.write(f"{target.file}.parquet", sets["tuned"])
    both = pictures.side_by_side([sets["base"], sets["tuned"]], ["base", "tuned"], pictures.SHEET_IMAGES // 2)
    target.out.write(f"{target.file}.png", pictures.png(both))
    target.out.write_json(f"{target.file}.json", judged.figures)


def show(targets: Sequence[Target]) -> None:
    """In the reports of finished runs (one in progress draws its own) and in MLflow, where their runs are: by the
    commands for that, which say themselves what fails."""
    for storage in [target.records.storage for target in targets if target.records]:
        records = Records.open(storage)  # not as it was before the judging
        if records.about["finished"] and storage.exists(REPORT):
            report.main([str(storage)])
        if saved_config(records).mlflow.enabled:
            command = [sys.executable, "-m", "learner.upload", str(storage)]
            try:
                subprocess.run(command, timeout=UPLOAD_SECONDS)
            except subprocess.TimeoutExpired:
                again = f"{summary.interpreter()} {' '.join(command[1:])}"
                complain("evaluate", f"no answer from MLflow in {UPLOAD_SECONDS} s; later: {again}")


def parser(
    verb: str, description: str, out: str = "of a LoRA: where to write (default: evaluation/ beside it)"
) -> argparse.ArgumentParser:  # fmt: skip
    """Arguments of `learner.evaluate` and `learner.compare`."""
    parser = argparse.ArgumentParser(prog=f"python -m learner.{verb}", description=description)
    add = parser.add_argument
    add("names", nargs="+", metavar="RUN_OR_LORA", help="and key=value settings, as learner.run takes them")
    add("--base", help="base model, instead of the run's (model.path)")
    add("--config", type=Path, help=f"settings, instead of the run's (of a LoRA in no run: {DEFAULT_CONFIG.name})")
    add("--images", type=int, help="how many (evaluation.images)")
    add("--prompts", help="file or set of prompts (evaluation.prompts)")
    add("--step", type=int, help="of a run: which checkpoint (default: the newest)")
    add("--out", type=Path, help=out)
    add("--cache", type=Path, help="where finished pictures are kept (default: ~/.cache/tributary)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    return run("evaluate", parser("evaluate", __doc__.splitlines()[0]).parse_intermixed_args(arguments), _show)


def _show(judged: Sequence[Judged]) -> None:
    show([result.target for result in judged])


def run(
    verb: str, args: argparse.Namespace, then: Callable[[list[Any]], None],
    require: Callable[[list[Target]], None] = lambda targets: None,
    judge: Callable[[Sequence[Target], Cache], list[Any]] = judge,
) -> int:  # fmt: skip
    """Find, `judge`, and call `then` with the results. `require` may refuse the targets with a ConfigError. Exit status
    as learner.run's."""
    targets = []

    def look() -> None:
        require_writable("--out", args.out, folder=True)
        targets.extend(find(*split(args.names), args, warner(verb)))
        if not targets:
            raise ConfigError("name a run or a LoRA")
        require(targets)

    if status := attempt(verb, look):
        return status
    signals.enter("running")
    try:
        then(judge(targets, Cache(args.cache)))
    except RunFailure as error:
        complain(verb, f"{type(error).__name__}: {error} (once that is mended, the same command goes on)")
        return 1
    except KeyboardInterrupt:
        complain(verb, "interrupted; the same command goes on")
        return signals.status()
    return 0
