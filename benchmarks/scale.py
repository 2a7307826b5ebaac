"""How far one driver and one object store go, with compute that is emulated (benchmarks/emulated.py): no GPU, no model.

    python -m benchmarks.scale samplers ranks spilling [--output F.json] [--samplers 256] [--lanes 16] ...

samplers    chunks a second of many samplers on one driver against the ideal; CPU seconds and memory of the driver
ranks       an update of 1, 4 and 8 gloo ranks: seconds and bytes of the all-reduce; one adapter, whatever the ranks
spilling    epochs of 4,096 trajectories of SDXL's 1024 x 1024 latents through an object store that they do not fit in

docs/performance.md says what the figures mean and what to set.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Self
from unittest.mock import patch

import psutil
import ray
from ray._private import internal_api  # noqa: TID251 - `ray memory`, which has the same, takes seconds a look

from actors.crew import Crew
from actors.ray_runner import RayRunner
from benchmarks import crowd, protocol
from benchmarks.emulated import FULL_SIZE, Emulation
from benchmarks.protocol import CHUNK, settings
from cluster import session
from learner.config import Config
from learner.protocol.chunks import training_chunks
from learner.protocol.ledger import Ledger
from learner.protocol.runner import EpochResult, Runner
from records import environment

SDXL_LORA = 23_224_320  # numbers: rank 16 on its attention projections
SECONDS = ("run.ready_seconds=1800", "run.chunk_seconds=1800", "run.train_seconds=3600")


class TooSmall(RuntimeError):
    """The disk does not hold what would be spilled."""


@dataclass(frozen=True)
class Sizes:
    samplers: int = 256
    lanes: int = 16  # samplers in a process
    seconds: tuple[float, ...] = (8.0, 4.0, 2.0, 1.0)  # that a sampler takes for a chunk
    ranks: tuple[int, ...] = (1, 4, 8)
    gradients: tuple[int, ...] = (FULL_SIZE.parameters, SDXL_LORA)
    trajectories: int = 4096
    steps: int = 4
    epochs: int = 3
    store: int = 2_000_000_000  # bytes
    latent: tuple[int, int, int] = (4, 128, 128)  # of SDXL's 1024 x 1024 pictures


def results(runner: Runner, config: Config, count: int) -> Iterator[tuple[float, EpochResult]]:
    """Train `count` epochs: the seconds of each, and what came of it. Every trajectory is accounted for, or LedgerError
    is raised."""
    ledger = Ledger()
    runner.begin(lambda epoch: training_chunks(config, ["a prompt"], epoch), range(count), ledger)
    for epoch in range(count):
        start = time.perf_counter()
        result = runner.train_epoch(epoch, 1.0, 0.0)
        ledger.close(epoch)
        runner.checkpoint_files()
        runner.closed(epoch)
        yield time.perf_counter() - start, result


def cpu_seconds() -> dict[str, float]:
    """Of the driver, of Ray's own processes, of the actors, and of the whole machine."""
    used = {"driver": 0.0, "ray": 0.0, "actors": 0.0}
    driver = psutil.Process()
    for process in [driver, *driver.children(recursive=True)]:
        try:
            times, name = process.cpu_times(), process.name()
        except psutil.Error:
            continue
        role = "driver" if process.pid == driver.pid else "actors" if name.startswith("ray::") else "ray"
        used[role] += times.user + times.system
    machine = psutil.cpu_times()
    return used | {"machine": sum(machine) - machine.idle - machine.iowait}


def samplers(sizes: Sizes) -> dict[str, Any]:
    """Two epochs, of which the second counts; four chunks a sampler."""
    count, rows, memory = sizes.samplers, [], psutil.Process()
    for seconds in sizes.seconds:
        actors = f"sampler.actors={count}", f"reward.actors={max(1, count // 64)}"  # emulated scoring takes no time
        config = settings(4 * count * CHUNK, *actors, *SECONDS)
        with (
            patch.object(Crew, "spawn", crowd.spawner(Crew.spawn, sizes.lanes)),
            protocol.running(RayRunner, config, Emulation(sample_seconds=seconds)) as runner,
        ):
            turns = results(runner, config, 2)
            next(turns)
            before, resident = cpu_seconds(), memory.memory_full_info().uss
            spent, result = next(turns)
            after, grown = cpu_seconds(), memory.memory_full_info().uss
        chunks, used = 4 * count, {role: after[role] - before[role] for role in before}
        row = {
            "samplers": count, "samplers_a_process": sizes.lanes, "chunk_seconds": seconds, "seconds": spent,
            "chunks_per_second": chunks / spent, "ideal": count / seconds,
            "of_ideal": chunks / spent * seconds / count, "waited_for_samplers": result.sample_seconds,
            "cpu_seconds": used, "driver_cpu_share": used["driver"] / spent,
            "driver_milliseconds_a_chunk": 1000 * used["driver"] / chunks,
            "ray_and_actors_milliseconds_a_chunk": 1000 * (used["ray"] + used["actors"]) / chunks,
            "machine_busy": used["machine"] / spent / (psutil.cpu_count() or 1),
            "driver_bytes": grown, "driver_bytes_grown": grown - resident,
        }  # fmt: skip
        rows.append(row)
        _say(f"  {json.dumps(row)}")
    return {"rows": rows}


def ranks(sizes: Sizes) -> dict[str, Any]:
    """Three epochs of one update each; the same trajectories and so, to the bit, the same adapter for all counts."""
    found, shas = [], set()
    for gradients in sizes.gradients:
        for count in sizes.ranks:
            config = settings(8 * CHUNK * 2, f"learner.ranks={count}", "sampler.actors=1", *SECONDS)
            work = Emulation(gradients=gradients)
            with protocol.running(RayRunner, config, work, crowd.ReducingLearner) as runner:
                epochs = list(results(runner, config, 4))[1:]
                shas.add(runner.snapshot.sha256)
            reduced = [row["all_reduce_seconds"] for _, result in epochs for row in result.training.updates]
            sent = 2 * (count - 1) / count * 4 * gradients
            found.append({
                "ranks": count, "numbers": gradients, "epoch_seconds": median(seconds for seconds, _ in epochs),
                "train_seconds": median(result.train_seconds for _, result in epochs),
                "all_reduce_seconds": median(reduced), "bytes_each_rank_sends": sent,
                "bytes_per_second": sent / median(reduced),
            })  # fmt: skip
            _say(f"  {count} ranks, {gradients} numbers: all-reduce {1000 * median(reduced):.0f} ms")
    if len(shas) != 1:
        raise AssertionError(f"adapters of {len(sizes.ranks)} counts of ranks: {len(shas)} different ones")
    return {"rows": found, "adapter_sha256": shas.pop()}


class Watch:
    """What the object store and its folder on disk hold, at most; looked at four times a second."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.last = folder, dict[str, int](), dict[str, int]()
        self._state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60)

    def now(self) -> dict[str, int]:
        stats = internal_api.get_memory_info_reply(self._state).store_stats
        files = 0
        for file in self.folder.glob("**/ray_spilled_objects*/*"):
            try:
                files += file.stat().st_size
            except FileNotFoundError:
                continue
        return {
            "in_store": stats.object_store_bytes_used, "beyond_it": stats.object_store_bytes_fallback,
            "on_disk": files, "spilled_in_all": stats.spilled_bytes_total,
            "read_back_in_all": stats.restored_bytes_total,
        }  # fmt: skip

    def _look(self) -> None:
        while not self._over.wait(0.25):
            try:
                self.last = self.now()
            except Exception as error:  # a raylet that is too busy to answer: the next look will do
                _say(f"  object store: {type(error).__name__}")
                continue
            self.most = {name: max(value, self.most.get(name, 0)) for name, value in self.last.items()}


@contextmanager
def store_of(size: int) -> Iterator[None]:
    """A Ray of our own with an object store of `size` bytes."""
    with patch.object(session, "_init", partial(session._init, object_store_memory=size)):
        yield


def spilling(sizes: Sizes) -> dict[str, Any]:
    """The samplers work ahead of a learner that reads every number, as far as train.max_staleness lets them."""
    work = Emulation(latent=sizes.latent, steps=sizes.steps, max_staleness=1)
    state = 4 * sizes.latent[0] * sizes.latent[1] * sizes.latent[2]
    trajectory = state * (2 * sizes.steps + 1)  # states and model outputs: what is kept until it is trained
    epoch, clean = sizes.trajectories * trajectory, sizes.trajectories * state * (sizes.steps + 1)
    bound = 2 * (epoch + clean)
    config = settings(sizes.trajectories, "sampler.actors=2", "train.max_staleness=1", *SECONDS)
    rows: list[dict[str, Any]] = []
    with store_of(sizes.store), protocol.running(RayRunner, config, work, crowd.ReadingLearner) as runner:
        assert isinstance(runner, RayRunner) and runner.crew.session._folder
        folder = runner.crew.session._folder.path
        if (free := shutil.disk_usage(folder).free) < bound + epoch:
            raise TooSmall(f"{(bound + epoch) / 1e9:.0f} GB may go to {folder}, {free / 1e9:.0f} are free: fewer steps")
        with Watch(folder) as watch:
            for seconds, result in results(runner, config, sizes.epochs):
                rows.append({
                    "seconds": seconds, "waited": result.score_seconds,
                    "train_seconds": result.train_seconds, "trained": len(result.training.trajectory_ids),
                    "epochs_in_work": runner.buffer.in_work, "store": watch.last,
                })  # fmt: skip
                _say(f"  {json.dumps(rows[-1])}")
    return {
        "trajectories": sizes.trajectories, "steps": sizes.steps, "epoch_bytes": epoch, "clean_bytes": clean,
        "bound_bytes": bound, "store_bytes": sizes.store, "epochs": rows, "most": watch.most,
        "trained": sum(row["trained"] for row in rows), "asked_for": sizes.epochs * sizes.trajectories,
    }  # fmt: skip


PARTS = {"samplers": samplers, "ranks": ranks, "spilling": spilling}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    for field in fields(Sizes):
        many, kind = isinstance(field.default, tuple), type(field.default)
        kind = type(field.default[0]) if many else kind
        parser.add_argument(f"--{field.name}", type=kind, nargs="+" if many else None, default=field.default)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args(arguments)
    given = {field.name: getattr(args, field.name) for field in fields(Sizes)}
    sizes = Sizes(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "environment": environment.facts()}
    report["load_average"] = psutil.getloadavg()
    for name in args.parts:
        _say(f"{name} ...")
        report[name] = PARTS[name](sizes)
        print(f"{name}: {json.dumps(report[name])}", flush=True)
        if args.output:
            args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
