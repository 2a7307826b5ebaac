"""What the actor-learner protocol costs, with compute that is emulated (benchmarks/emulated.py): no GPU and no model.

    python -m benchmarks.protocol overhead broadcast staleness memory scaling [--output F.json] [--picture F.png]

overhead    the Ray runner against the in-process runner: Stable Diffusion 1.5's latents, 250 ms a chunk of 8
broadcast   a new adapter from publishing until 4 samplers have loaded and hashed it, against two bare ways
staleness   trajectories a second with train.max_staleness 1 against 0, sampling and training equally long
memory      driver, object store and spilling over 50 epochs, with a learner slower than its samplers
scaling     chunks a second with 1 to 64 samplers

docs/performance.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import ray
import torch
from matplotlib.figure import Figure
from torch import nn

from actors.ray_runner import RayRunner
from benchmarks import emulated
from benchmarks.emulated import FULL_SIZE, EmulatedLearner, Emulation
from cluster.session import Session
from cluster.waits import get
from diffusion import lora
from diffusion.snapshot import Snapshot, digest
from learner import build
from learner.config import Config, load_config
from learner.inprocess import InProcessRunner
from learner.protocol.chunks import training_chunks
from learner.protocol.ledger import Ledger
from learner.protocol.runner import Hooks, Runner
from records import environment

SECONDS = 120  # deadline of anything here
CHUNK = 8
SAMPLERS = (1, 2, 4, 8, 16, 32, 64)
# The attention projections of Stable Diffusion 1.5's U-Net: (input, output) widths of their 128 layers.
WIDTHS = [
    (width, width) for width, blocks in ((320, 5), (640, 5), (1280, 6)) for _ in range(blocks * 6)
] + [(768, width) for width, blocks in ((320, 5), (640, 5), (1280, 6)) for _ in range(blocks * 2)]  # fmt: skip


def settings(trajectories: int, *overrides: str) -> Config:
    return load_config(
        overrides=[
            f"train.trajectories={trajectories}", f"sampler.chunk_size={CHUNK}", "prompts.per_prompt=4",
            "train.updates_per_epoch=1", "learner.ranks=1", "reward.actors=1", "flow.fit_steps=0",
            "flow.warmup_steps=0", *overrides,
        ]
    )  # fmt: skip


@contextmanager
def running(
    kind: Callable[..., Runner], config: Config, emulation: Emulation, learner: type[EmulatedLearner] = EmulatedLearner
) -> Iterator[Runner]:
    with patch.object(build, "parts", lambda *_: emulated.parts(emulation, learner)):
        runner = kind(config, None, Hooks())
        try:
            yield runner
        finally:
            runner.close()


def epochs(runner: Runner, config: Config, count: int) -> Iterator[float]:
    """Train `count` epochs; seconds of each."""
    ledger = Ledger()
    runner.begin(lambda epoch: training_chunks(config, ["a prompt"], epoch), range(count), ledger)
    for epoch in range(count):
        start = time.perf_counter()
        runner.train_epoch(epoch, 1.0, 0.0)
        ledger.close(epoch)
        runner.checkpoint_files()
        runner.closed(epoch)
        yield time.perf_counter() - start


def overhead(rounds: int = 6, chunks: int = 8) -> dict[str, Any]:
    """Both runners live side by side and take turns, an epoch each; the first epochs are not counted."""
    config = settings(chunks * CHUNK, "sampler.actors=1")
    work = replace(FULL_SIZE, sample_seconds=0.25)
    with running(InProcessRunner, config, work) as plain, running(RayRunner, config, work) as on_ray:
        either = [epochs(plain, config, rounds + 1), epochs(on_ray, config, rounds + 1)]
        times = [[next(one) for one in either] for _ in range(rounds + 1)][1:]
    ratios = [ray_seconds / seconds for seconds, ray_seconds in times]
    return {
        "chunks": chunks, "in_process_seconds": [a for a, _ in times], "ray_seconds": [b for _, b in times],
        "ratios": ratios, "ratio": median(ratios),
    }  # fmt: skip


class Layers(nn.Module):
    """The LoRA of a U-Net without the U-Net."""

    def __init__(self) -> None:
        super().__init__()
        for i, (wide, out) in enumerate(WIDTHS):
            self.register_parameter(f"lora_a_{i:03d}", nn.Parameter(torch.zeros(4, wide)))
            self.register_parameter(f"lora_b_{i:03d}", nn.Parameter(torch.zeros(out, 4)))


class Reader:
    """Loads a version in one of three ways, and hashes what it has then."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.layers = Layers()
        self.flat = np.zeros(sum(p.numel() for p in self.layers.parameters()), np.float32)

    def product(self, snapshot: Snapshot) -> str:
        lora.load(self.layers, snapshot.flat)
        return lora.snapshot(self.layers, 0).sha256

    def flat_buffer(self, flat: np.ndarray) -> str:
        self.flat[:] = flat
        return digest(self.flat)

    def tensors(self, state: dict[str, torch.Tensor]) -> str:
        self.layers.load_state_dict(state)
        return lora.snapshot(self.layers, 0).sha256


def broadcast(rounds: int = 15, readers: int = 4) -> dict[str, Any]:
    """Milliseconds until all readers have answered, the three ways in turn."""
    session = Session(1)
    try:
        actors = [ray.remote(Reader).options(num_cpus=0.1).remote() for _ in range(readers)]
        layers = Layers()
        generator = torch.Generator().manual_seed(0)
        times: dict[str, list[float]] = {"product": [], "flat_buffer": [], "tensors": []}
        for i in range(rounds + 2):
            for parameter in layers.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator)
            snapshot = lora.snapshot(layers, i)
            state = {name: value.clone() for name, value in layers.state_dict().items()}
            for name in times:
                start = time.perf_counter()
                ref = ray.put({"product": snapshot, "flat_buffer": snapshot.flat, "tensors": state}[name])
                seen = get([getattr(actor, name).remote(ref) for actor in actors], SECONDS, name, "a benchmark")
                times[name].append(1000 * (time.perf_counter() - start))
                assert set(seen) == {snapshot.sha256}, name
                del ref
    finally:
        session.close()
    times = {name: values[2:] for name, values in times.items()}
    middle = {name: median(values) for name, values in times.items()}
    return {
        "parameters": len(snapshot.flat), "readers": readers, "milliseconds": times, "median_milliseconds": middle,
        "against_flat_buffer": median(a / b for a, b in zip(times["product"], times["flat_buffer"], strict=True)),
        "against_tensors": median(a / b for a, b in zip(times["product"], times["tensors"], strict=True)),
    }  # fmt: skip


def staleness(count: int = 12) -> dict[str, Any]:
    """Two samplers of 250 ms a chunk, 8 chunks, and 1 s of training: a second each. The first two epochs are not
    counted: a pipeline must fill first."""
    found: dict[str, Any] = {}
    for bound in (0, 1):
        config = settings(8 * CHUNK, "sampler.actors=2", f"train.max_staleness={bound}")
        work = Emulation(sample_seconds=0.25, train_seconds=1.0, max_staleness=bound)
        with running(RayRunner, config, work) as runner:
            seconds = list(epochs(runner, config, count))[2:-1]
        found[f"trajectories_per_second_{bound}"] = 8 * CHUNK * len(seconds) / sum(seconds)
    found["ratio"] = found["trajectories_per_second_1"] / found["trajectories_per_second_0"]
    return found


def memory(count: int = 50, bound: int = 1) -> dict[str, Any]:
    """Driver's memory, bytes in the object store and bytes spilled, epoch by epoch; the learner takes twice as long as
    its samplers, which must wait for it."""
    chunks = 4
    config = settings(chunks * CHUNK, "sampler.actors=2", f"train.max_staleness={bound}")
    work = replace(FULL_SIZE, sample_seconds=0.1, train_seconds=0.4, max_staleness=bound)
    resident, pinned, ahead = [], [], []
    with running(RayRunner, config, work) as runner:
        process = psutil.Process()
        for i, _ in enumerate(epochs(runner, config, count)):
            resident.append(process.memory_full_info().uss)  # its own: not the object store that it maps
            assert isinstance(runner, RayRunner)
            ahead.append(sum(work.snapshot is not None for work in runner.buffer.part("train", i + 1)))
            if i % 10 == 9:
                pinned.append(_store())
    per_chunk = sum(array.nbytes for array in _chunk_arrays(work, config))
    tenth = count // 10
    return {
        "epochs": count, "epoch_bytes": chunks * per_chunk, "private_bytes": resident,
        "growth": median(resident[-tenth:]) / median(resident[tenth : 2 * tenth]) - 1,
        "object_store": pinned, "most_object_store_bytes": max(one["used_bytes"] for one in pinned),
        "bound_bytes": (bound + 1) * chunks * per_chunk, "spilled_bytes": max(one["spilled_bytes"] for one in pinned),
        "chunks_ahead_when_trained": [min(ahead[:-1]), max(ahead)],
    }  # fmt: skip


def _chunk_arrays(work: Emulation, config: Config) -> list[np.ndarray]:
    sampler = emulated.EmulatedSampler(replace(work, sample_seconds=0))
    flat = np.zeros(work.parameters, np.float32)
    made, _ = sampler.sample(training_chunks(config, ["a prompt"], 0)[0], Snapshot(0, flat, digest(flat)))
    return [value for value in vars(made).values() if isinstance(value, np.ndarray)]


def _store() -> dict[str, int]:
    """What `ray memory` says of the object store."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "memory", "--stats-only"]
    address = ray.get_runtime_context().gcs_address
    said = subprocess.run([*command, "--address", address], capture_output=True, text=True, timeout=SECONDS).stdout
    used = re.search(r"Plasma memory usage (\d+) MiB", said)
    spilled = re.search(r"Spilled (\d+) MiB", said)
    if not used:
        raise RuntimeError(f"ray memory: {said[-300:]}")
    return {"used_bytes": int(used[1]) << 20, "spilled_bytes": int(spilled[1]) << 20 if spilled else 0}


def scaling(counts: Sequence[int] = SAMPLERS, sample_seconds: float = 0.5) -> dict[str, Any]:
    """Chunks a second of an epoch with n samplers that take `sample_seconds` a chunk, small arrays; n / sample_seconds
    would be no overhead at all. As many chunks as keep all samplers busy 6 times."""
    found = []
    for count in counts:
        config = settings(6 * count * CHUNK, f"sampler.actors={count}", f"reward.actors={max(1, count // 16)}")
        with running(RayRunner, config, Emulation(sample_seconds=sample_seconds)) as runner:
            seconds = median(list(epochs(runner, config, 4))[1:])
        found.append({"samplers": count, "chunks_per_second": 6 * count / seconds, "ideal": count / sample_seconds})
        print(f"  {count} samplers: {found[-1]['chunks_per_second']:.1f} chunks/s", file=sys.stderr, flush=True)
    return {"sample_seconds": sample_seconds, "rows": found}


def picture(rows: Sequence[dict[str, float]], file: Path) -> None:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    samplers = [row["samplers"] for row in rows]
    axes.plot(samplers, [row["ideal"] for row in rows], color="0.6", linestyle="--", label="no overhead")
    axes.plot(samplers, [row["chunks_per_second"] for row in rows], color="tab:blue", marker="o", label="measured")
    axes.set(xscale="log", yscale="log", xlabel="samplers", ylabel="chunks a second", xticks=samplers)
    axes.set_xticks(samplers, labels=[str(count) for count in samplers])
    axes.minorticks_off()
    axes.set_title(f"One driver, emulated samplers, {os.cpu_count()} CPU cores", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "overhead": overhead, "broadcast": broadcast, "staleness": staleness, "memory": memory, "scaling": scaling,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.protocol", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--picture", type=Path, help="PNG file for scaling")
    args = parser.parse_args(arguments)
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "environment": environment.facts()}
    for name in args.parts:
        print(f"{name} ...", file=sys.stderr, flush=True)
        report[name] = PARTS[name]()
        shown = {key: value for key, value in report[name].items() if isinstance(value, int | float | str)}
        print(f"{name}: {json.dumps(shown)}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.picture and "scaling" in report:
        picture(report["scaling"]["rows"], args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
