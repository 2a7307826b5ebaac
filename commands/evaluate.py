"""Judges finished adapters beside their base model: `python -m learner.evaluate RUN_OR_LORA... [key=value ...]`.

A RUN is a run's folder or URL (its newest checkpoint, or --step); a LORA a .safetensors file or the folder it is in.
What is written, RUN/evaluation/step-NNNNNN.json, .parquet and .png (of a LoRA: into --out), is in docs/evaluation.md.
Stopped? The same command goes on: finished chunks are kept (evaluation/image_sets.py).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import signals
from diffusion.failures import RunFailure
from evaluation import image_sets
from evaluation.adapters import OTHER_SEED, Target, find, split
from evaluation.image_sets import Cache, Pools
from learner.config import DEFAULT_CONFIG, Config, ConfigError, saved_config
from records.run_folder import Records
from reports.progress import Bar

UPLOAD_SECONDS = 120
TITLES = {
    "accuracy": "prompt accuracy", "vendi": "diversity (Vendi)", "vendi_per_prompt": "diversity within a prompt",
    "distance": "distance within a prompt", "fid": "drift from the base (Frechet)", "kid": "drift (kernel)",
    "fid_per_prompt": "drift within a prompt",
}  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """The result for one adapter: the figures (image_sets.compare, with what they are of), the sets' Parquet files."""

    target: Target
    figures: dict[str, Any]
    sets: dict[str, bytes]


def judge(targets: Sequence[Target], cache: Cache, say: Callable[[str], None]) -> list[Judged]:
    """Judge each, write its files, and say its table.

    Raises:
        Exception: what sampling, scoring or writing raises; what is finished stays.
    """
    with Bar() as bar:
        groups = itertools.groupby(targets, key=lambda target: target.config)
        return [judged for _, alike in groups for judged in _judge_alike(list(alike), cache, say, bar)]


def _judge_alike(targets: Sequence[Target], cache: Cache, say: Callable[[str], None], bar: Bar) -> list[Judged]:
    """Targets of one config share their actors, which are started when a picture is missing."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def pools() -> Pools:
            started = _start(targets[0].config, lambda text: bar.around(say, text))
            stack.callback(started.close)
            bar.around(say, started.description)
            return started

        results = []
        for target in targets:
            sets = {
                name: cache.make(image_set, pools, functools.partial(bar.show, f"{target.name}, {name}"))
                for name, image_set in target.sets().items()
            }
            figures = {**_facts(target), **image_sets.compare(sets["tuned"], sets["base"], sets["other"])}
            _write(target, figures, sets)
            bar.around(say, table(target, figures))
            results.append(Judged(target, figures, sets))
    return results


def _start(config: Config, say: Callable[[str], None]) -> Pools:
    if config.run.runner == "inprocess":
        from learner.inprocess import InProcessPools

        return InProcessPools(config)
    from actors.rollouts import evaluation_pools

    return evaluation_pools(config, say)


def table(target: Target, figures: dict[str, Any]) -> str:
    """The figures for a terminal."""
    rows = [(f"reward, {target.config.reward.name}", figures["reward"])]
    rows += [(f"held out: {label}", figure) for label, figure in figures["held_out"].items()]
    rows += [(title, figures[name]) for name, title in TITLES.items()]
    lines = [f"{target.name}: {target.config.evaluation.images} images, features: {target.config.evaluation.features}",
             f"{'':32}{'tuned':>9}  {'95 % interval':<20}{'base':>9}{'noise alone':>13}"]  # fmt: skip
    for title, figure in rows:
        if figure is not None:
            value, low, high, base, floor = (number(figure[k]) for k in ("value", "low", "high", "base", "floor"))
            lines.append(f"{title:32}{value:>9}  {f'[{low}, {high}]':<20}{base:>9}{floor:>13}")
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Four figures, or a dash for what is not known."""
    return "-" if value is None else f"{value:.4g}"


def _facts(target: Target) -> dict[str, Any]:
    evaluation, sampler = target.config.evaluation, target.config.sampler
    return {
        "format": image_sets.FORMAT, "name": target.name, "adapter_sha256": target.adapter.sha256, **target.facts,
        "base_model": target.config.model.path, "reward_name": target.config.reward.name,
        "settings": {
            "images": evaluation.images, "prompts": len(set(target.prompts)), "seed": evaluation.seed,
            "other_seed": evaluation.seed + OTHER_SEED, "features": evaluation.features, "steps": sampler.steps,
            "guidance": sampler.guidance, "eta": sampler.eta, "grid": sampler.grid,
        },
    }  # fmt: skip


def _write(target: Target, figures: dict[str, Any], sets: dict[str, bytes]) -> None:
    """The figures last: where they are, the rest is."""
    from reports import pictures

    target.out.write(f"{target.file}.parquet", sets["tuned"])
    both = pictures.side_by_side([sets["base"], sets["tuned"]], ["base", "tuned"], pictures.SHEET_IMAGES // 2)
    target.out.write(f"{target.file}.png", pictures.png(both))
    target.out.write(f"{target.file}.json", (json.dumps(figures, indent=1) + "\n").encode())


def redraw(judged: Sequence[Judged], warn: Callable[[str], None]) -> None:
    """Make the reports of finished runs anew, with these figures (an unfinished run draws its own). A report that
    cannot be drawn is only a warning."""
    from reports import html

    for storage in [one.target.records.storage for one in judged if one.target.records]:
        try:
            records = Records.open(storage)  # not as it was before the judging
            if records.about.get("finished") and storage.exists(html.FILE):
                storage.write(html.FILE, html.render(records, saved_config(records)))
        except Exception as error:
            warn(f"{storage}/{html.FILE} is without these figures: {type(error).__name__}: {error}")


def upload(judged: Sequence[Judged], warn: Callable[[str], None]) -> None:
    """Show them in MLflow, where their runs are: in a process of its own, with a deadline."""
    for records in [one.target.records for one in judged if one.target.records]:
        if not saved_config(records).mlflow.enabled:
            continue
        command = [sys.executable, "-m", "learner.upload", str(records.storage)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=UPLOAD_SECONDS)
            fault = (done.stderr.strip().splitlines() or ["it failed"])[-1] if done.returncode else None
        except subprocess.TimeoutExpired:
            fault = f"no answer in {UPLOAD_SECONDS} s"
        if fault:
            warn(f"not in MLflow yet: {fault} (later: python -m learner.upload {records.storage})")


def parser(
    name: str, description: str, out: str = "of a LoRA: where to write (default: evaluation/ beside it)"
) -> argparse.ArgumentParser:  # fmt: skip
    """Arguments of `learner.evaluate` and `learner.compare`."""
    parser = argparse.ArgumentParser(prog=f"python -m learner.{name}", description=description)
    add = parser.add_argument
    add("names", nargs="+", metavar="RUN_OR_LORA", help="and key=value settings, as learner.run takes them")
    add("--base", help="base model, instead of the run's (model.path)")
    add("--config", type=Path, help=f"settings for a LoRA that is from no run (default: {DEFAULT_CONFIG.name})")
    add("--images", type=int, help="how many (evaluation.images)")
    add("--prompts", help="file or set of prompts (evaluation.prompts)")
    add("--step", type=int, help="of a run: which checkpoint (default: the newest)")
    add("--out", type=Path, help=out)
    add("--cache", type=Path, help="where finished pictures are kept (default: ~/.cache/tributary)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = parser("evaluate", __doc__.splitlines()[0]).parse_intermixed_args(arguments)

    def warn(text: str) -> None:
        complain("learner.evaluate", f"warning: {text}")

    def show(judged: list[Judged]) -> None:
        redraw(judged, warn)
        upload(judged, warn)

    return run("learner.evaluate", args, show)


def run(
    program: str, args: argparse.Namespace, then: Callable[[list[Judged]], None],
    require: Callable[[list[Target]], None] = lambda targets: None,
) -> int:  # fmt: skip
    """Find, judge, and call `then` with the results. `require` may refuse the targets with a ConfigError. Exit status
    as learner.run's."""
    signals.running()
    try:
        targets = find(*split(args.names), args)
        if not targets:
            raise ConfigError("name a run or a LoRA")
        require(targets)
    except (OSError, ValueError) as error:
        for line in str(error).splitlines():
            complain(program, line)
        return 2
    try:
        then(judge(targets, Cache(args.cache), functools.partial(print, flush=True)))
    except RunFailure as error:
        complain(program, f"{type(error).__name__}: {error} (once that is mended, the same command goes on)")
        return 1
    except KeyboardInterrupt:
        complain(program, "interrupted; the same command goes on")
        return signals.status()
    return 0


def complain(program: str, text: str) -> None:
    print(f"{program}: {text}", file=sys.stderr, flush=True)
