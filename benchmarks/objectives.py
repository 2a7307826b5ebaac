"""Objectives compared by one protocol, target samplers and reward maximisers in one table: docs/results.md.

    python -m benchmarks.objectives [key=value ...] --out runs/objectives [--only rtb ddpo] [--trials 4] [--seeds 5]

One prompt of the embedded model, of whose right answers a reward prefers some: the target p_ref exp(beta r) is known
from base pictures. Objectives that learn from a reward's gradient train on its smooth form; the other judges all. Each
has the same number of tuning trials, drawn from its grid (GRIDS), with one seed and noise. Its best settings then train
with fresh seeds and are judged on fresh noise. Target samplers are chosen by total variation to the target, reward
maximisers by mean reward; these are judged where their reward passes the target's, too. Failures are in the table.

Not all aim at that target: dag_db and dag_kl aim at exp(beta r) without p_ref, residual_nabla_db at the reward of the
window's clean prediction. Left out: nabla_db, tb and sub_tb, without p_ref as well; residual_nabla_db_no_flow, which
has no exact target.

Writes trials.json, results.json, results.md and pareto.png into --out; runs and pictures there are not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.objectives_shown import pareto, row, table
from evaluation import tilts
from learner.config import Config, ConfigError, as_arguments, load_config
from learner.objectives.needs import NEEDS

ROOT = Path(__file__).parent.parent
Result = dict[str, Any]  # of a run: its kind, settings, seed, folder, and `failed` (why), or its figures
TASK = {
    "prompts.path": ["a red circle on a white background"], "prompts.per_prompt": 16, "sampler.steps": 10,
    "sampler.guidance": 3.0, "sampler.chunk_size": 16, "sampler.noise": "window", "sampler.adapter": "window",
    "objective.window": [0, 3], "lora.rank": 16, "lora.targets": "all", "learner.micro_batch": 64,
    "run.runner": "inprocess", "run.keep_checkpoints": 1, "run.thumbnail_pixels": 0, "evaluation.images": 0,
    "mlflow.enabled": False,
}  # fmt: skip
REWARD, SMOOTH = "shapes_preference", "shapes_preference_soft"
OPTIONS, ATTRIBUTE = {"place_x": 0.2}, "place_x"  # a unit for every 5 pixels to the right
BETA = 1.0
TUNING_SEED, TUNING_NOISE, NOISE = 100, 1, 2  # run.seed of trials; evaluation.seed of trials, and of what is reported

# Settings of each, and what its trials are drawn from; `train` is trajectories and updates an epoch.
Values = dict[str, Sequence[Any]]
RATES: Values = {"learner.learning_rate": (1e-3, 3e-3, 1e-2)}  # below, nothing moves in a thousand trajectories
SMALL: Values = {"train": ((64, 2), (64, 4))}
MEDIUM: Values = {"train": ((64, 4), (128, 8))}
LARGE: Values = {"train": ((256, 1), (512, 1))}
NATURAL: Values = {"learner.natural_epochs": (1, 3), "learner.natural_floor": (0.1, 1.0)}
WEIGHTS: Values = {"objective.transition_weight": ("uniform", "variance")}
CLIPS: Values = {"objective.clip_range": (0.05, 0.2)}
TRAJECTORIES: Values = {"objective.trajectory_weight": ("uniform", "target")}
FIT = {"learner.schedule": "linear", "learner.adam_beta2": 0.95, "train.replay_updates": 8, "train.replay_epochs": 16}
SUM = {"objective.log_prob_reduction": "sum", "objective.regulariser": 0.0, "objective.anneal_fraction": 0.0}
FLOW = {"flow.widths": [32, 64], "flow.stem_stride": 2, "flow.learning_rate": 1e-3, "flow.fit_steps": 4,
        "flow.warmup_steps": 100, "flow.batch": 64, "flow.replay_epochs": 4}  # fmt: skip
GRIDS: dict[str, tuple[dict[str, Any], Values]] = {
    "rtb": ({"learner.optimizer": "natural"}, LARGE | NATURAL),
    "rsub": ({"learner.optimizer": "natural", **FLOW}, LARGE | NATURAL),
    "rdb": (FLOW, SMALL | RATES | WEIGHTS),
    "dag_db": (SUM | FLOW, SMALL | RATES | WEIGHTS),
    "dag_kl": (SUM | FLOW, SMALL | RATES | CLIPS),
    "adjoint_matching": ({}, SMALL | RATES),
    "fitted_nabla_db": (FIT, MEDIUM | RATES | TRAJECTORIES),
    "forward_fitted_nabla_db": (FIT, MEDIUM | RATES | TRAJECTORIES),
    "residual_nabla_db": (
        {"flow.widths": [16, 32], "flow.learning_rate": 1e-3, "objective.regulariser": 0.0},
        SMALL | RATES | {"objective.forward_looking_decay": ("none", "abar")},
    ),
    "ddpo": (SUM, SMALL | RATES | CLIPS),
    "grpo": ({}, SMALL | RATES | CLIPS),
}
SECONDS = 14_400  # of a run, and of judging one


def maximises(kind: str) -> bool:
    """Whether it has no target at all, and is chosen by its reward."""
    return not NEEDS[kind].residual and not NEEDS[kind].noising_kernel


def size(kind: str) -> int:
    return math.prod(map(len, GRIDS[kind][1].values()))


def trials(kind: str, count: int) -> list[dict[str, Any]]:
    """`count` different points of its grid, by a draw that the name fixes: the first at random, then those that have
    most settings unlike all before, so that few trials see most of the values."""
    grid = GRIDS[kind][1]
    order = np.random.default_rng(list(kind.encode())).permutation(size(kind))
    left = [*np.stack(np.unravel_index(order, [len(values) for values in grid.values()]), 1).tolist()]
    chosen = [left.pop(0)]
    while len(chosen) < count:
        unlike = [min(sum(map(int.__ne__, place, other)) for other in chosen) for place in left]
        chosen.append(left.pop(unlike.index(max(unlike))))
    return [{key: grid[key][i] for key, i in zip(grid, place, strict=True)} for place in chosen]


def settings(kind: str, point: Mapping[str, Any], budget: int) -> dict[str, Any]:
    """Of a run at a point of the grid that draws `budget` trajectories."""
    own = dict(point)
    trajectories, updates = own.pop("train")
    return {
        **TASK, "reward.name": SMOOTH if NEEDS[kind].reward_gradients else REWARD, "reward.options": OPTIONS,
        "objective.kind": kind, "objective.beta": BETA, "train.trajectories": trajectories,
        "train.updates_per_epoch": updates, "train.epochs": budget // trajectories,
        **({"run.keep_checkpoints": 0} if maximises(kind) else {}), **GRIDS[kind][0], **own,
    }  # fmt: skip


def score(one: Result) -> float:
    """What a trial is chosen by: least is best."""
    if "failed" in one:
        return math.inf
    if maximises(one["kind"]):
        return -float(one["target"]["reward"]["value"])
    return float(next(law for law in one["target"]["attributes"] if law["name"] == ATTRIBUTE)["tv"]["value"])


def passes(lines: Sequence[Mapping[str, Any]], wanted: float) -> int | None:
    """Step of the first checkpoint whose rollouts, those of the next epoch, have at least this mean reward; None: none
    has. Of a run's metrics.jsonl."""
    pairs = itertools.pairwise(line for line in lines if line["epoch"] >= 0)
    return next((int(before["step"]) for before, after in pairs if after["reward_mean"] >= wanted), None)


def frontier(rewards: np.ndarray, groups: np.ndarray) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Nats and gain of ideal tilts of base pictures, as far as these tell, and the target's: above them nothing is."""
    exponents = (0.0, *(BETA * np.geomspace(0.1, 30, 80)))
    told = filter(lambda exponent: tilts.known(rewards, groups, exponent), exponents)
    curve = [tilts.tilted(rewards, groups, exponent)[1:] for exponent in told]
    return curve, tilts.tilted(rewards, groups, BETA)[1:]


def told(kind: str, point: Mapping[str, Any], args: argparse.Namespace) -> list[str]:
    """A run's settings as learner.run takes them, over an empty file."""
    return [*shlex.split(as_arguments(settings(kind, point, args.budget))), *args.overrides]


def epoch_flops(config: Config) -> float:
    from commands import plan

    return plan.work(config, plan.costs(config), 1).flops


class Comparison:
    """The runs in a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out.resolve()
        (self.out / "trials").mkdir(parents=True, exist_ok=True)
        (self.out / "empty.yaml").write_text("{}\n")  # no preset's setting matters

    def run(self, kind: str, point: Mapping[str, Any], folder: str, seed: int, noise: int) -> Result:
        """Train, unless it is done, and judge."""
        about = {"kind": kind, "settings": dict(point), "seed": seed, "folder": folder}
        place = [f"run.dir={self.out / folder}", f"run.seed={seed}", "--config", str(self.out / "empty.yaml")]
        failed = self._call("run", [*told(kind, point, self.args), *place], folder)
        return about | ({"failed": failed} if failed else self.judge(folder, noise))

    def judge(self, folder: str, noise: int, step: int | None = None) -> Result:
        """learner.targets' figures of a run, of all runs by the same reward."""
        asked = ["--beta", str(BETA), "--given", ATTRIBUTE]
        if failed := self._call("targets", [*self._judged(folder, noise, step), *asked], f"{folder}-judged"):
            return {"failed": failed}
        files = (self.out / folder / "evaluation").glob("targets-*.json")
        newest = max(files, key=lambda file: file.stat().st_mtime)
        return {"step": step, "noise": noise, "target": json.loads(newest.read_text())}

    def at_the_target(self, one: Result) -> Result:
        """A reward maximiser's run where its reward passes the target's."""
        if "failed" in one:
            return one
        lines = (self.out / one["folder"] / "metrics.jsonl").read_text().splitlines()
        step = passes([json.loads(line) for line in lines], one["target"]["reward"]["target"])
        if step is None:
            return one | {"failed": "its reward never passes the target's"}
        return one | self.judge(one["folder"], NOISE, step)

    def certify(self, one: Result, flops: float) -> tuple[np.ndarray, np.ndarray]:
        """Add the certificate's figures, those of learner.evaluate but against this target, and the FLOPs. Returns
        rewards of base pictures, and numbers of their prompts."""
        from commands import evaluate
        from evaluation import adapters, certificate, image_sets

        def measure(target: adapters.Target, sets: dict[str, bytes]) -> tuple[Any, str]:
            tuned, *base = (image_sets.read_images(sets[name]) for name in ("tuned", "base", "other"))
            found = certificate.measure(tuned, [part.rewards for part in base], BETA)
            return (found, base), f"{one['folder']}: gap {found['gap']}, {found['nats']} nats from the base model"

        asked = self._judged(one["folder"], one["noise"], one["step"])
        options = evaluate.parser("evaluate", "").parse_intermixed_args(asked)
        found = adapters.find(*adapters.split(options.names), options, print)
        one["certificate"], base = evaluate.draw(found, image_sets.Cache(options.cache), measure)[0]
        one["flops"] = flops * one["target"]["epochs_done"]
        rewards = np.concatenate([part.rewards for part in base])
        groups = np.unique(np.concatenate([part.prompts for part in base]), return_inverse=True)[1]
        return rewards[good := np.isfinite(rewards)], groups[good]

    def _judged(self, folder: str, noise: int, step: int | None) -> list[str]:
        by = shlex.split(as_arguments({"reward.name": REWARD, "reward.options": OPTIONS, "evaluation.seed": noise}))
        options = ["--images", str(self.args.images), "--cache", str(self.out / "cache")]
        return [str(self.out / folder), *by, *options, *(["--step", str(step)] if step else [])]

    def _call(self, verb: str, arguments: Sequence[str], log: str) -> str | None:
        """Why it failed; None: it did not."""
        command = [sys.executable, "-m", f"learner.{verb}", *arguments]
        with (self.out / f"{log}.log").open("wb") as file:
            try:
                status = subprocess.run(command, cwd=ROOT, timeout=SECONDS, stdout=file, stderr=file).returncode
            except subprocess.TimeoutExpired:
                return f"learner.{verb} took over {SECONDS} s"
        return f"learner.{verb} ended with status {status}: see {log}.log" if status else None


def compare(args: argparse.Namespace) -> None:
    """Trials, runs, and what is written of them."""
    here, kinds = Comparison(args), args.only
    with ThreadPoolExecutor(args.workers) as pool:
        # Trial by trial and seed by seed: a comparison that is broken off has something of every objective.
        points = {kind: trials(kind, args.trials) for kind in kinds}
        numbered = [(kind, i) for i in range(args.trials) for kind in kinds]
        jobs = [(kind, points[kind][i], f"trials/{kind}-{i}", TUNING_SEED, TUNING_NOISE) for kind, i in numbered]
        tried = list(pool.map(here.run, *zip(*jobs, strict=True)))
        write(here.out / "trials.json", tried)
        best = {kind: min((one for one in tried if one["kind"] == kind), key=score)["settings"] for kind in kinds}
        seeds = range(1, args.seeds + 1)
        jobs = [(kind, best[kind], f"{kind}-{seed}", seed, NOISE) for seed in seeds for kind in kinds]
        results = list(pool.map(here.run, *zip(*jobs, strict=True)))
        named = {kind: [one for one in results if one["kind"] == kind] for kind in kinds}
        for kind in filter(maximises, kinds):
            named[f"{kind} where it passes the target's reward"] = list(pool.map(here.at_the_target, named[kind]))
    every = [one for found in named.values() for one in found]
    good = [one for one in every if "failed" not in one]
    flops = {kind: epoch_flops(load_config({}, told(kind, best[kind], args))) for kind in {one["kind"] for one in good}}
    base = [here.certify(one, flops[one["kind"]]) for one in good]
    rows = [row(name, found, ATTRIBUTE) for name, found in named.items()]
    effort = f"{args.trials} trials of each objective, {args.seeds} fresh seeds, {args.budget} trajectories a run."
    failures = sorted({f"{one['folder']}: {one['failed']}" for one in [*tried, *every] if "failed" in one})
    text = "\n".join([table(rows), effort, *(f"* {failure}" for failure in failures)]) + "\n"
    write(here.out / "results.json", {"runs": named, "rows": rows, "effort": effort, "failures": failures})
    (here.out / "results.md").write_text(text)
    if base:
        pareto(rows, *frontier(*base[0])).savefig(here.out / "pareto.png", dpi=120)
    print(text)


def write(file: Path, found: Any) -> None:
    file.write_text(json.dumps(found, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--only", nargs="+", choices=GRIDS, default=list(GRIDS))
    add("--trials", type=int, default=4, help="of each objective")
    add("--seeds", type=int, default=5, help="fresh ones, of the best trial's settings")
    add("--budget", type=int, default=4096, help="trajectories a run")
    add("--images", type=int, default=1024, help="judged pictures of each run; of the base model twice as many")
    add("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, a core each")
    add("overrides", nargs="*", metavar="key=value", help="for every run")
    args = parser.parse_intermixed_args(arguments)
    if not 1 <= args.trials <= (least := min(map(size, args.only))):
        parser.error(f"--trials: equal effort: from 1 to {least}, the points of the smallest grid")
    for kind in args.only:
        for point in trials(kind, args.trials):
            try:
                load_config({}, told(kind, point, args))
            except ConfigError as error:
                parser.error(f"{kind}: {error}")
    compare(args)


if __name__ == "__main__":
    main()
