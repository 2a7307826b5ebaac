"""Time to a reward: one task, one base model, several ways to train, in turns on one core.

    python -m benchmarks.race --out runs/race [--seeds 1 2 3] [--only NAME ...] [--images 64] [key=value ...]

(a) the published algorithm as usually coded (published.py), (b) DDPO as usually coded (usual_ddpo.py), (c) objectives
of this project: ENTRIES. One process; whoever has spent the fewest seconds trains its next epoch, so a drifting machine
affects all alike. Seconds are the process's own CPU seconds: of one thread, what a free core's clock says; models are
loaded beforehand. After every few epochs (`every`), outside of the clock, each is judged by the mean reward of pictures
of the same fresh noise. (b) trains all of its epochs; the reward it ends with is to be reached. Another entry stops
where it has and (b) is done, at the end of its epochs, or after LIMIT times (b)'s seconds.

Reached where the straight line between two judgements first is at that reward; seconds, calls and trajectories are read
off at the same share of the way. (b) is held to the same rule. Not reached is a result.

A seed's curves are in OUT/seed-N.json, which is not made again; race.json, race.md and race.png are of all seeds there.
Exit status 2: bad input, said in one line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.measure import processor
from benchmarks.parts import COMPARISON
from benchmarks.published import Published
from benchmarks.race_shown import Size, picture, reached, rows, sizes_table, table
from benchmarks.usual import Rollouts, Usual
from benchmarks.usual_ddpo import UsualDDPO
from commands import plan
from commands.networks import passes_of
from diffusion import lora
from diffusion.base_model import BaseModel
from diffusion.locate import PUBLISHED as CONFIGURATIONS
from diffusion.locate import ROOT
from diffusion.rollout import Sampler
from diffusion.trajectory import Chunk
from learner import build
from learner.config import Config, ConfigError, as_arguments, load_config
from learner.inprocess import InProcessRunner
from learner.prompts import training_prompts
from learner.protocol.chunks import training_chunks
from learner.protocol.ledger import Ledger
from learner.protocol.runner import Hooks
from records import environment
from rewards.scorer import Scorer

NOISE = 1_000_003  # run.seed of the judged pictures, which no run has
LIMIT = 3.2  # times (b)'s seconds
# Presets whose networks are counted.
SIZES = {"SD1.5": "sd15_hpsv2.yaml", "SDXL": "sdxl_pickscore.yaml", "SD3.5-medium": "sd35_medium_pickscore.yaml",
         "FLUX.1-dev": "flux_dev_pickscore.yaml"}  # fmt: skip
KINDS = ("guided", "single", "decode", "flow")  # samples through them; with `_train` with a way back


class Entry(NamedTuple):
    """A way to train. `way` is published, usual_ddpo or ours."""

    way: str
    settings: dict[str, Any]
    every: int = 1  # epochs between two judgements


USUAL, PUBLISHED = "DDPO, as usual", "DAG-DB, as published"
TASK: dict[str, Any] = {
    "model.path": "models/shapes", "prompts.path": ["a red circle on a white background"], "prompts.per_prompt": 16,
    "sampler.steps": 10, "sampler.guidance": 3.0, "sampler.chunk_size": 16, "reward.name": "shapes_preference",
    "reward.options": {"place_x": 0.2}, "lora.rank": 16, "lora.targets": "all", "learner.micro_batch": 16,
    "learner.learning_rate": 2.5e-3, "objective.regulariser": 0.0, "train.epochs": 5, "train.trajectories": 64,
    "train.updates_per_epoch": 2, "run.runner": "inprocess", "run.thumbnail_pixels": 0, "evaluation.images": 0,
    "mlflow.enabled": False, "run.chunk_seconds": 86_400, "run.train_seconds": 86_400,  # it may be stopped for others
}  # fmt: skip
# As configs/shapes_ddpo.yaml.
DDPO = {"objective.kind": "ddpo", "objective.transition_weight": "variance", "objective.last_transition": "skip"}
WINDOW = {"objective.window": [0, 3], "sampler.noise": "window", "sampler.adapter": "window", "learner.micro_batch": 64}
FITTED = WINDOW | {
    "objective.beta": 4.0, "objective.trajectory_weight": "target", "learner.learning_rate": 3e-3,
    "learner.adam_beta2": 0.95, "learner.schedule": "linear", "train.updates_per_epoch": 4, "train.replay_updates": 4,
    "train.replay_epochs": 7, "train.epochs": 4,
}  # fmt: skip
ENTRIES = {
    USUAL: Entry("usual_ddpo", DDPO, 2),
    PUBLISHED: Entry("published", dict(each.split("=") for each in COMPARISON) | {
        "flow.widths": [32, 64], "flow.stem_stride": 2, "flow.learning_rate": 1e-3, "objective.regulariser": 0.1,
        "objective.beta": 4.0, "train.epochs": 30,
    }, 2),
    "ddpo, window": Entry("ours", DDPO | WINDOW | {"objective.last_transition": "train", "train.epochs": 4}, 1),
    "fitted_nabla_db": Entry("ours", FITTED | {"objective.kind": "fitted_nabla_db"}),
    "forward_fitted_nabla_db": Entry("ours", FITTED | {
        "objective.kind": "forward_fitted_nabla_db", "reward.name": "shapes_preference_soft",
    }),
}  # fmt: skip


class Calls:
    """Samples that went through each network, while `on`."""

    def __init__(self) -> None:
        self.on = False
        self.counts = dict.fromkeys((*KINDS, *(f"{kind}_train" for kind in KINDS)), 0)

    def add(self, kind: str, samples: int) -> None:
        if self.on:
            self.counts[f"{kind}_train" if torch.is_grad_enabled() else kind] += samples

    def watch(self, model: BaseModel) -> None:
        predict = model.predict

        def counted(x: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor, guidance: float) -> Any:
            self.add("single" if guidance == 1 else "guided", len(x))
            return predict(x, t, embeddings, guidance)

        model.predict = counted  # type: ignore[method-assign]

    def watch_decoder(self, scorer: Scorer) -> None:
        decoder = scorer.decoder

        def counted(latents: torch.Tensor) -> torch.Tensor:
            self.add("decode", len(latents))
            return decoder(latents)

        scorer.decoder = counted

    def watch_flow(self, flow: torch.nn.Module | None) -> None:
        if flow is not None:
            flow.register_forward_pre_hook(lambda _, given: self.add("flow", len(given[0])))


class Racer:
    """One entry of one seed: trains an epoch a turn, and is judged beside the clock."""

    def __init__(self, entry: Entry, config: Config, images: int) -> None:
        self.entry, self.config = entry, config
        self.calls, self.seconds, self.wall, self.epochs = Calls(), 0.0, 0.0, 0
        self.curve: list[dict[str, float]] = []
        build.prepare_process(config)
        self.train, self.model, scorer = (self._ours if entry.way == "ours" else self._usual)()
        self.calls.watch_decoder(scorer)
        settings = replace(
            config.rollout_settings(), image_only=True, forward_looking="none", reference=False, first=0, end=None
        )
        self.sampler = Sampler(self.model, settings)
        # By what the task rewards, without gradients: an entry may train on a smooth form of it.
        self.judging = build.build_scorer(load_config({}, shlex.split(as_arguments(TASK))))
        prompts, size = training_prompts(config), config.sampler.chunk_size
        self.judged = [
            Chunk(start // size, "train", 0, NOISE, tuple(prompts[i % len(prompts)] for i in ids), tuple(ids))
            for start in range(0, images, size)
            for ids in [range(start, min(start + size, images))]
        ]

    def turn(self) -> None:
        """An epoch on the clock; then a judgement, where one is due."""
        self.calls.on = True
        wall, start = time.perf_counter(), time.process_time()
        self.train(self.epochs)
        self.seconds += time.process_time() - start
        self.wall += time.perf_counter() - wall
        self.calls.on = False
        self.epochs += 1
        if self.epochs % self.entry.every == 0 or self.done:
            self.judge()

    @property
    def done(self) -> bool:
        return self.epochs == self.config.train.epochs

    def judge(self) -> None:
        """Mean reward of the fixed noise under the weights as they stand."""
        snapshot = lora.snapshot(self.model.unet, self.epochs)
        rewards: list[float] = []
        for chunk in self.judged:
            scores = self.judging.score(self.sampler.sample(chunk, snapshot)[1])
            rewards += scores.rewards[:, -1].tolist()
        spent = {"seconds": self.seconds, "wall": self.wall, "epochs": self.epochs} | self.calls.counts
        spent["trajectories"] = self.epochs * self.config.train.trajectories
        self.curve.append({"reward": math.fsum(rewards) / len(rewards), **spent})

    def _usual(self) -> tuple[Callable[[int], object], BaseModel, Scorer]:
        config, model, scorer = (
            self.config,
            build.build_model(self.config, training=True),
            build.build_scorer(self.config),
        )
        self.calls.watch(model)
        prompts = training_prompts(config)
        loop: Usual
        if self.entry.way == "published":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.run.seed + 1)
                flow = build.flow_network(config, model.latent_shape, model.embedding_width)
            assert flow is not None
            self.calls.watch_flow(flow)
            loop = Published(model, scorer, flow, config)
        else:
            loop = UsualDDPO(model, scorer, config)
        loop.decode = lambda latents: scorer.decoder(latents)  # as it is counted

        def epoch(number: int) -> None:
            parts = [loop.sample(chunk.prompts) for chunk in training_chunks(config, prompts, number)]
            loop.train(Rollouts.join(parts), config.objective.beta, config.train.updates_per_epoch)

        return epoch, model, scorer

    def _ours(self) -> tuple[Callable[[int], object], BaseModel, Scorer]:
        config = self.config
        runner = InProcessRunner(config, None, Hooks(say=lambda text: None))
        self.calls.watch(runner.sampler.model)
        self.calls.watch(runner.learner.model)
        self.calls.watch_flow(runner.learner.flow)
        ledger, prompts = Ledger(None), training_prompts(config)
        runner.begin(lambda epoch: training_chunks(config, prompts, epoch), range(config.train.epochs), ledger)

        def epoch(number: int) -> None:
            runner.train_epoch(number, config.objective.beta, config.objective.reward_offset or 0.0)
            ledger.close(number)
            runner.closed(number)

        return epoch, runner.learner.model, runner.scorer


def race(seed: int, names: Sequence[str], images: int, overrides: Sequence[str], so_far: Path) -> None:
    """Every entry's curve, all of one seed, in the JSON file `so_far`, which grows with them."""
    racers = {name: Racer(ENTRIES[name], settings(name, seed, overrides), images) for name in names}
    for racer in racers.values():
        racer.judge()
    going = dict(racers)
    while going:
        name = min(going, key=lambda each: going[each].seconds)
        going[name].turn()
        wanted = None if USUAL in going else racers[USUAL].curve[-1]
        told = {key: round(racers[name].curve[-1][key], 3) for key in ("epochs", "seconds", "reward")}
        print(f"seed {seed}, {name}: {told}", flush=True)
        going = {name: each for name, each in going.items() if not over(each, wanted)}
        curves = {name: racer.curve for name, racer in racers.items()}
        so_far.write_text(json.dumps(curves, indent=1) + "\n")


def over(racer: Racer, wanted: dict[str, float] | None) -> bool:
    """Whether it need not go on; `wanted`: how (b) ended, once it has."""
    if racer.epochs == racer.config.train.epochs:
        return True
    if wanted is None:
        return False
    return reached(racer.curve, wanted["reward"]) is not None or racer.seconds > LIMIT * wanted["seconds"]


def settings(name: str, seed: int, overrides: Sequence[str]) -> Config:
    given = TASK | ENTRIES[name].settings | {"run.seed": seed}
    return load_config({}, [*shlex.split(as_arguments(given)), *overrides])


def report(out: Path, names: Sequence[str], overrides: Sequence[str], images: int) -> str:
    """Of the seeds in `out`: writes race.json, race.md, race.png; returns the tables."""
    seeds = {file.stem.removeprefix("seed-"): json.loads(file.read_text()) for file in sorted(out.glob("seed-*.json"))}
    curves = list(seeds.values())
    own = Size(plan.costs(settings(USUAL, 0, overrides)), 2)
    sizes = {name: size_of(file) for name, file in SIZES.items()}
    lines = rows(curves, USUAL, PUBLISHED, own)
    facts = environment.facts()
    about = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "hardware": {"cpu": processor(), "cores": os.cpu_count()},
        "versions": {name: facts[name] for name in (*environment.PACKAGES, "python")},
        "git_commit": facts["git_commit"],
        "images": images, "limit": LIMIT, "overrides": list(overrides),
        "settings": {name: ENTRIES[name].settings for name in names}, "task": TASK,
    }  # fmt: skip
    text = f"{table(lines)}\n{sizes_table(lines, sizes)}"
    (out / "race.json").write_text(json.dumps({"about": about, "rows": lines, "seeds": seeds}, indent=1) + "\n")
    (out / "race.md").write_text(text)
    picture(curves, USUAL).savefig(out / "race.png", dpi=120)
    return text


def size_of(file: str) -> Size:
    """Of a preset, counted by the configurations without weights in configs/models."""
    preset = ROOT / "configs" / file
    where = CONFIGURATIONS / load_config(preset, []).model.path
    config = load_config(preset, [f"model.path={where}", "objective.kind=dag_db"])  # whose log-flow is counted
    return Size(plan.costs(config), passes_of(config))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--only", nargs="+", choices=ENTRIES, default=list(ENTRIES), help=f"entries; {USUAL} is always there")
    add("--images", type=int, default=64, help="judged pictures")
    add("overrides", nargs="*", metavar="key=value", help="for every entry")
    args = parser.parse_intermixed_args(arguments)
    names = [name for name in ENTRIES if name in (USUAL, *args.only)]
    try:
        for name in names:
            settings(name, args.seeds[0], args.overrides)
    except ConfigError as error:
        print(f"benchmarks.race: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        file = args.out / f"seed-{seed}.json"
        if not file.exists():
            race(seed, names, args.images, args.overrides, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
    print(report(args.out, names, args.overrides, args.images))
    return 0


if __name__ == "__main__":
    sys.exit(main())
