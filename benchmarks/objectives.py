"""Reward gained per sampled trajectory by each objective on the embedded model, through Ray: docs/results.md.

    python -m benchmarks.objectives --out runs/objectives [--seeds 1 2 3] [--only ddpo dag_kl]

Runs that are there already are only read, stopped ones go on. Two to five minutes a run on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from learner.statistics import paired_interval

RUN_SECONDS = 24 * 3600
SHORT = "train.epochs=20"
REPLAY = ("train.replay_updates=2", "train.replay_epochs=3")
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ddpo": ("shapes_ddpo", ()),
    "dag_kl": ("shapes_dag_kl", ()),
    "dag_db": ("shapes_alignment", ()),
    "residual_nabla_db": ("shapes_residual_nabla_db", ()),
    "residual_nabla_db_no_flow": ("shapes_residual_nabla_db_no_flow", ()),
    "nabla_db": ("shapes_nabla_db", ()),
    "dag_db, replay": ("shapes_alignment", (SHORT, *REPLAY)),
    "residual_nabla_db, replay": ("shapes_residual_nabla_db", REPLAY),
}


def run(name: str, seed: int, folder: Path) -> None:
    """Train, on evaluation noise that no setting was chosen on."""
    config, overrides = RUNS[name]
    command = [
        sys.executable, "-m", "learner.run", "--config", f"configs/{config}.yaml", f"run.dir={folder}",
        f"run.seed={seed}", "evaluation.seed=1", "mlflow.enabled=false", *overrides,
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent, timeout=RUN_SECONDS)


def row(name: str, folders: list[Path]) -> str:
    """A line of the table: evaluated reward before, gain of each seed with its 95 % interval, per 1000 trajectories."""
    gains, trained, before = [], 0, 0.0
    halfway = []
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        evaluated = [line for line in lines if line["eval_reward_mean"] is not None]
        first, last = (
            np.array(json.loads((folder / f"evaluation/{file}.json").read_text())["reward"])
            for file in ("epoch-before", f"epoch-{lines[-1]['epoch']:06d}")
        )
        gains.append((float((last - first).mean()), *paired_interval(first, last)))
        trained, before = lines[-1]["trajectories_trained"], float(first.mean())
        halfway.append(evaluated[len(evaluated) // 2]["eval_reward_mean"] - before)
    each = ", ".join(f"{gain:+.3f} [{low:.3f}, {high:.3f}]" for gain, low, high in gains)
    rate = np.mean([gain for gain, _, _ in gains]) / trained * 1000
    return f"| {name} | {before:.3f} | {np.mean(halfway):+.3f} | {each} | {trained} | {rate:+.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    rows = []
    for name in args.only:
        folders = [args.out.resolve() / f"{name.replace(', ', '-')}-{seed}" for seed in args.seeds]
        for seed, folder in zip(args.seeds, folders, strict=True):
            run(name, seed, folder)
        rows.append(row(name, folders))
    print("| objective | before | gain halfway (mean) | gain, a seed each [95 %] | trajectories | gain per 1000 |")
    print("|---|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
