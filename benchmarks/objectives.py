"""Every objective on the embedded model from the same number of sampled trajectories: docs/results.md has the outcome.

    python -m benchmarks.objectives [key=value ...] --out runs/objectives [--seeds 1 2 3] [--only ddpo dag_kl]

Each trains with its preset's settings, in process and on one core, as many at a time as --workers says; then
learner.evaluate judges all of them by the same two rewards, on prompts' noise that no setting was chosen on. Writes
results.md, results.json and pareto.png into --out. Runs and pictures that are there already are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a server
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
PRESETS = {
    "ddpo": "shapes_ddpo",
    "dag_kl": "shapes_dag_kl",
    "dag_db": "shapes_alignment",
    "residual_nabla_db": "shapes_residual_nabla_db",
    "residual_nabla_db_no_flow": "shapes_residual_nabla_db_no_flow",
    "nabla_db": "shapes_nabla_db",
}
EPOCHS = 20  # of 64 trajectories
NOISE = 1  # evaluation.seed: the presets were chosen on 0
IMAGES = 256
REWARD, OTHER_REWARD = "shapes_alignment", "shapes_alignment_soft"  # what black-box objectives train on, and the rest
RUN_SECONDS, JUDGE_SECONDS = 3600, 3600


def train(name: str, seed: int, folder: Path, settings: Sequence[str]) -> float:
    """Train, unless it is done. Returns seconds.

    Raises:
        RuntimeError: it failed; says where its words are.
    """
    start = time.monotonic()
    command = [
        sys.executable, "-m", "learner.run", "--config", f"configs/{PRESETS[name]}.yaml", f"run.dir={folder}",
        f"run.seed={seed}", "run.runner=inprocess", f"train.epochs={EPOCHS}", "evaluation.images=64",
        "evaluation.every=10", f"evaluation.seed={NOISE}", "mlflow.enabled=false", *settings,
    ]  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("wb") as log:
        done = subprocess.run(command, cwd=ROOT, timeout=RUN_SECONDS, stdout=log, stderr=log)
    if done.returncode:
        raise RuntimeError(f"{name}, seed {seed}, ended with status {done.returncode}: see {folder}.log")
    return time.monotonic() - start


def judge(folders: Sequence[Path], images: int, cache: Path) -> list[dict[str, Any]]:
    """learner.evaluate's figures of each run, all by the same rewards and noise."""
    command = [
        sys.executable, "-m", "learner.evaluate", *map(str, folders), f"reward.name={REWARD}",
        f"evaluation.held_out=[{OTHER_REWARD}]", f"evaluation.seed={NOISE}", "--images", str(images),
        "--cache", str(cache),
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=ROOT, timeout=JUDGE_SECONDS)
    files = [(folder / "evaluation").glob(f"step-*-{images}-images-*.json") for folder in folders]
    return [json.loads(max(each, key=lambda file: file.stat().st_mtime).read_text()) for each in files]


def row(name: str, found: Sequence[dict[str, Any]]) -> str:
    """A line of the table, of one objective's seeds."""

    def mean(figure: str) -> str:
        known = [one[figure]["value"] for one in found if one[figure]]
        return f"{np.mean(known):.3g}" if known else "-"

    gains = [one["reward"]["gain"] for one in found]
    each = ", ".join(
        f"{one['reward']['gain']:+.3f} [{one['reward']['gain_low']:.3f}, {one['reward']['gain_high']:.3f}]"
        for one in found
    )
    soft = np.mean([one["held_out"][OTHER_REWARD]["gain"] for one in found])
    rate = np.mean([gain / one["trajectories_trained"] * 1000 for gain, one in zip(gains, found, strict=True)])
    seconds = np.mean([one["seconds"] for one in found])
    return (
        f"| {name} | {np.mean(gains):+.3f} | {each} | {rate:+.4f} | {soft:+.3f} | {mean('accuracy')} "
        f"| {mean('distance')} | {mean('fid')} | {seconds:.0f} |"
    )


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown, best gain first, the base model last."""

    def gain(name: str) -> float:
        return -float(np.mean([one["reward"]["gain"] for one in results[name]]))

    base = next(iter(results.values()))[0]
    head = ["objective", f"{REWARD}: mean gain", "each seed [95 %]", "per 1000 trajectories",
            f"{OTHER_REWARD}: mean gain", "accuracy", "distance", "drift (fid)", "seconds"]  # fmt: skip
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    rows += [row(name, results[name]) for name in sorted(results, key=gain)]
    apart = f"{base['distance']['base']:.3g}" if base["distance"] else "-"
    rows.append(
        f"| base model: {base['reward']['base']:.3f} | | | | {base['held_out'][OTHER_REWARD]['base']:.3f} | "
        f"{base['accuracy']['base']:.3g} | {apart} | {base['fid']['base']:.3g} (itself) | |"
    )
    return "\n".join(rows) + "\n"


def pareto(results: dict[str, list[dict[str, Any]]]) -> Figure:
    """Reward against diversity and against drift: a small mark a seed, with 95 % intervals; a large one their mean."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    base = next(iter(results.values()))[0]
    for ax, name, title in (
        (panels[0], "distance", "diversity within a prompt (mean distance; right is better)"),
        (panels[1], "fid", "drift from the base model (Frechet distance; left is better)"),
    ):
        for index, (kind, runs) in enumerate(results.items()):
            colour, found = f"C{index}", [one for one in runs if one[name]]
            if not found:  # no prompt has two pictures
                continue
            x, y = (np.array([[one[key][part] for part in ("value", "low", "high")] for one in found])
                    for key in (name, "reward"))  # fmt: skip
            spread = [np.abs(one[:, 1:] - one[:, :1]).T for one in (x, y)]
            ax.errorbar(x[:, 0], y[:, 0], xerr=spread[0], yerr=spread[1], marker="o", markersize=3, linestyle="",
                        color=colour, elinewidth=0.6, alpha=0.5)  # fmt: skip
            ax.plot(
                [x[:, 0].mean()], [y[:, 0].mean()], marker="D", markersize=9, linestyle="", color=colour, label=kind
            )
        ax.plot([base[name]["base"]] if base[name] else [], [base["reward"]["base"]] if base[name] else [], marker="*",
                markersize=13, color="black", linestyle="", label="base model")  # fmt: skip
        ax.set_xlabel(title)
        ax.grid(alpha=0.25)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    panels[0].set_ylabel(f"reward ({REWARD})")
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="training runs at a time, a core each")
    parser.add_argument("--images", type=int, default=IMAGES, help="judged pictures of each run")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for every training run")
    args = parser.parse_intermixed_args(arguments)
    out, start = args.out.resolve(), time.monotonic()
    # Seed by seed: a benchmark that is broken off has every objective rather than every seed of some.
    jobs = [(name, seed, out / f"{name}-{seed}") for seed in args.seeds for name in args.only]
    with ThreadPoolExecutor(args.workers) as pool:
        for (name, seed, _), seconds in zip(jobs, pool.map(lambda job: train(*job, args.settings), jobs), strict=True):
            print(f"{name}, seed {seed}: {seconds:.0f} s", flush=True)
    found = dict(
        zip(
            [(name, seed) for name, seed, _ in jobs],
            judge([job[2] for job in jobs], args.images, out / "cache"),
            strict=True,
        )
    )
    results = {name: [found[name, seed] for seed in args.seeds] for name in args.only}
    text = table(results)
    (out / "results.md").write_text(text)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    pareto(results).savefig(out / "pareto.png", dpi=120)
    print(f"{text}\nall in {time.monotonic() - start:.0f} s; {out}/results.md, results.json, pareto.png", flush=True)


if __name__ == "__main__":
    main()
