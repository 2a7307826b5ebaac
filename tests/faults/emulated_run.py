"""Small runs over the emulated parts, and what must be equal whatever befell them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

# 3 epochs of 4 chunks, each epoch in 2 updates, among which 1 or 2 ranks share the chunks. What the emulated parts do
# not read is the default preset's.
SETTINGS = (
    "sampler.chunk_size=4", "prompts.per_prompt=2", "train.trajectories=16", "train.epochs=3",
    "train.updates_per_epoch=2", "evaluation.images=4", "evaluation.every=2", "sampler.actors=2", "reward.actors=1",
    "flow.batch=8", "learner.ranks=2", "learner.micro_batch=1", "mlflow.enabled=false", "run.thumbnail_pixels=0",
)  # fmt: skip
IN_PROCESS = ("run.runner=inprocess", "learner.ranks=1")
TIMES = ("time", "seconds", "sample_seconds", "score_seconds", "train_seconds", "evaluate_seconds")
COLUMNS = ["epoch", "trajectory_id", "policy_version", "adapter_sha256", "prompt", "reward", "log_pf_sum", "beta"]


def use_emulated_parts(patch: pytest.MonkeyPatch, **seconds: float) -> None:
    """In all runs while `patch` holds."""
    from benchmarks import emulated  # soak.py needs no torch
    from learner import build

    parts = emulated.parts(emulated.Emulation(**seconds))
    patch.setattr(build, "parts", lambda config, own_reward=None: parts)


def totals(folder: Path) -> dict[str, int]:
    """The ledger's."""
    return json.loads((folder / "checkpoints/latest/state.json").read_text())["ledger"]["totals"]


def lora(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "checkpoints/latest/lora").iterdir()}


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run is about, without its times and losses: equal for equal runs."""
    newest = folder / "checkpoints/latest"
    state = json.loads((newest / "state.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = pq.read_table(folder / "trajectories", columns=COLUMNS).to_pylist()
    return {
        "LoRA": lora(folder),
        "learner": [file.read_bytes() for file in sorted(newest.glob("learner.*"))],
        "cursor": [state[key] for key in ("step", "next_epoch", "prompts_drawn", "policy_version", "adapter_sha256")],
        "ledger": {stage: count for stage, count in totals(folder).items() if stage != "lost"},
        "metrics": [{k: v for k, v in line.items() if k not in (*TIMES, "lost_trajectories")} for line in lines],
        "rows": [tuple(row.values()) for row in rows],
        "evaluations": {file.name: file.read_bytes() for file in (folder / "evaluation").iterdir()},
        "checkpoints": sorted(file.name for file in (folder / "checkpoints").glob("step-*")),
    }
