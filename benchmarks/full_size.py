"""The whole service once at a public model's full size, with random weights, on a CPU: what it takes, beside the plan.

    python -m benchmarks.full_size [--model sd15|sdxl|sd35_medium] [--pixels 256] [--tiny] [--output F.json]

Builds the pipeline from its published configuration (benchmarks/random_models.py), asks `--plan`, then runs the preset
on Ray with a cheap reward: two trajectories of two steps, one update, a new policy. It ends after an epoch and goes on
with a second; the LoRA is exported, and plain diffusers draws with it. The same with a tiny model comes first: what the
processes take without a network's weights. docs/performance.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import psutil
import pyarrow.parquet as pq

from benchmarks.random_models import MODELS, Model, build
from learner.config import ROOT
from records import environment

COMMAND_SECONDS = 7200
LOOK_SECONDS = 0.2
EPOCHS = 2
# The preset, small: what is left of it is the model, its LoRA, its precision and its objective.
SMALL = (
    "run.cpu_threads=1", "run.train_seconds=3600", "run.chunk_seconds=1800", "prompts.per_prompt=1",
    "sampler.actors=1", "sampler.chunk_size=1", "sampler.steps=2", "learner.ranks=1", "learner.micro_batch=1",
    "reward.actors=1", "reward.name=jpeg_compressibility", "reward.black_images=allow", "reward.batch=1",
    "model.channels_last=false",  # for GPUs: on a CPU it would copy the convolutions' weights, which are mapped
    "train.trajectories=2", "train.updates_per_epoch=1", "evaluation.images=0", "mlflow.enabled=false",
)  # fmt: skip
# Roles by what Ray calls their processes; what is planned of them, by --plan's words.
TITLES = {
    "ray::SamplerActor": "sampler", "ray::RewardActor": "reward actor", "ray::LearnerActor": "learner rank",
    "ray::TextActor": "text encoders",
}  # fmt: skip
OTHERS = "Ray's own and others"
PLANNED = re.compile(
    r"^(?:memory)? +(sampler|learner rank|reward actor|text encoders)[^:=]*: ([\d.]+) GB", re.MULTILINE
)
TINY = ("flow.widths=[8,16]", "lora.rank=2")

# Draws with the exported LoRA as anyone would, and says how much it changes.
RELOAD = """
import json, sys, torch, diffusers
folder, lora, pixels = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(2)
index = json.load(open(folder + "/model_index.json"))
absent = {name: None for name, value in index.items() if value == [None, None]}  # a T5
pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16, **absent)
pipeline.set_progress_bar_config(disable=True)
def draw():
    options = dict(num_inference_steps=2, height=pixels, width=pixels, output_type="latent")
    return pipeline("a cat", generator=torch.Generator().manual_seed(0), **options).images.float()
before = draw()
pipeline.load_lora_weights(lora)
after = draw()
assert after.isfinite().all() and not torch.equal(before, after), "the LoRA changes nothing"
print((after - before).pow(2).mean().sqrt().item() / before.pow(2).mean().sqrt().item())
"""


class Failed(RuntimeError):
    """A command of the service did not do what it should."""


class Watch:
    """Peak memory by role of a process's descendants: what is resident, less what is shared with the object store, and
    less the files that it maps (`alone`); of all of them together at a time `alone`, with the object store once."""

    def __init__(self, root: int) -> None:
        self.root, self.most, self.alone = root, dict[str, int](), dict[str, int]()
        self.together = self.store = 0
        self._peaks: dict[tuple[int, float], tuple[str, int, int]] = {}  # by process
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)
        for role, most, alone in self._peaks.values():
            self.most[role] = max(most, self.most.get(role, 0))
            self.alone[role] = max(alone, self.alone.get(role, 0))

    def _look(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            total, shared = 0, 0
            for process in psutil.Process(self.root).children(recursive=True):
                try:
                    key, role = (process.pid, process.create_time()), _role(process)
                    alone, files, store = _resident(process.pid)
                except (psutil.Error, OSError, KeyError):  # it is gone
                    continue
                before, most, most_alone = self._peaks.get(key, (OTHERS, 0, 0))
                role = before if role == OTHERS else role  # an actor is nobody while it is built
                self._peaks[key] = role, max(most, alone + files), max(most_alone, alone)
                total, shared = total + alone, max(shared, store)
            self.store, self.together = max(self.store, shared), max(self.together, total + shared)


def _role(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    found = next((role for title, role in TITLES.items() if line.startswith(title)), None)
    return found or ("driver" if "learner.run" in line else OTHERS)


def _resident(pid: int) -> tuple[int, int, int]:
    """Bytes of a process: its own, of files that it maps, of shared memory, which is the object store's."""
    text = Path(f"/proc/{pid}/status").read_text()
    kilobytes = {name: int(number) for name, number in re.findall(r"Rss(\w+):\s+(\d+) kB", text)}
    return 1024 * kilobytes["Anon"], 1024 * kilobytes["File"], 1024 * kilobytes["Shmem"]


def command(*arguments: str) -> tuple[str, float]:
    """What `python ...` says, and its seconds. Raises Failed."""
    known = {**os.environ, "HF_HUB_OFFLINE": "1", "RAY_AUTH_MODE": "token"}
    start = time.perf_counter()
    how: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "env": known, "timeout": COMMAND_SECONDS}
    done = subprocess.run([sys.executable, *arguments], **how)
    if done.returncode:
        raise Failed(f"{' '.join(arguments[:3])}: exit status {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout, time.perf_counter() - start


def serve(model: Model, folder: Path, pixels: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Plan, run, interrupt, go on, export, reload; what each took."""
    run_dir = folder.with_name(f"{folder.name}-run")
    size = f"model.path={folder}", f"model.pixels={pixels}", f"run.dir={run_dir}"
    run = "-m", "learner.run", "--config", f"configs/{model.preset}", *SMALL, *size, *overrides
    plan, plan_seconds = command(*run, f"train.epochs={EPOCHS}", "--plan")
    with Watch(os.getpid()) as watch:
        _, first = command(*run, "train.epochs=1")
        said, second = command(*run, f"train.epochs={EPOCHS}")
        if "going on from" not in said:
            raise Failed(f"the run did not go on: {said[-1000:]}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    if [line["epoch"] for line in lines] != list(range(EPOCHS)):
        raise Failed(f"epochs {[line['epoch'] for line in lines]} were recorded")
    rows = [row for file in sorted(run_dir.glob("trajectories/*.parquet")) for row in pq.read_table(file).to_pylist()]
    out = folder.with_name(f"{folder.name}-export")
    _, export = command("-m", "learner.export", str(run_dir), "--format", "diffusers", "--out", str(out))
    changed, reload = command("-c", RELOAD, str(folder), str(out), str(pixels))
    return {
        "plan": [line for line in plan.splitlines() if line.strip()], "planned_bytes": planned(plan),
        "peak_bytes": watch.most, "peak_bytes_without_files": watch.alone, "peak_bytes_together": watch.together,
        "object_store_bytes": watch.store,
        "seconds": {
            "plan": plan_seconds, "the run, one epoch": first, "going on, another": second,
            "export": export, "reload in diffusers, 2 pictures": reload,
            "sampling a trajectory": [row["sample_seconds"] for row in rows],
            "scoring a trajectory": [row["score_seconds"] for row in rows],
            "training an epoch": [line["train_seconds"] for line in lines],
        },
        "rewards": [row["reward"] for row in rows], "change_by_lora": float(changed.split()[-1]),
        "checkpoint_bytes": sum(file.stat().st_size for file in run_dir.glob("checkpoints/step-000002/**/*")),
    }  # fmt: skip


def planned(text: str) -> dict[str, float]:
    """Bytes by role, as --plan says them."""
    return {role: float(number) * 1e9 for role, number in PLANNED.findall(text)}


def measure(model: Model, folder: Path, pixels: int | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Build the model in `folder`, tiny where that is its name, and serve it."""
    tiny, start = folder.name == "tiny", time.perf_counter()
    build(model, folder, tiny)
    size, seconds = (
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        time.perf_counter() - start,
    )
    _say(f"{model.path}, {folder.name}: {size / 1e9:.2f} GB in {seconds:.0f} s")
    side = 64 if tiny else pixels or 256
    found = serve(model, folder, side, [*(TINY if tiny else ()), *overrides])
    _say(json.dumps({key: value for key, value in found.items() if key != "plan"}))
    return {"pixels": side, "weights_bytes": size, "build_seconds": seconds, **found}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.full_size", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--pixels", type=int, help="side of the pictures; default: 256, tiny: 64")
    parser.add_argument("--tiny", action="store_true", help="the tiny model alone")
    parser.add_argument("--folder", type=Path, help="for weights and run, removed at the end; default: a temporary one")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the run")
    args = parser.parse_intermixed_args(arguments)
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "model": args.model,
        "environment": environment.facts(),
    }
    place = Path(tempfile.mkdtemp(prefix="full-size-", dir=args.folder))
    try:
        for name in ("tiny",) if args.tiny else ("tiny", "full"):
            report[name] = measure(MODELS[args.model], place / name, args.pixels, args.overrides)
            if args.output:
                args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(table(report))
    return 0


def table(report: dict[str, Any]) -> str:
    """By role: planned, the same with what a process takes without weights, measured, how far that is apart, and what
    of it are no mapped files."""
    shown = report.get("full", report["tiny"])
    lines = ["| process | planned | and without weights | measured | apart | of it no mapped files |", "|---" * 6 + "|"]
    for role, peak in sorted(shown["peak_bytes"].items()):
        bare, plan = report["tiny"]["peak_bytes"].get(role, 0), shown["planned_bytes"].get(role)
        said = " | ".join((_gb(plan), _gb(plan + bare))) if plan else " | "
        apart = f"{peak / (plan + bare) - 1:+.0%}" if plan else ""
        lines.append(f"| {role} | {said} | {_gb(peak)} | {apart} | {_gb(shown['peak_bytes_without_files'][role])} |")
    together = f"{_gb(shown['peak_bytes_together'])} with the object store"
    return "\n".join([*lines, f"| all at one time | | | | | {together} |"])


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
