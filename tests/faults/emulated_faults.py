"""Emulated parts of which one suffers one fault: in one role, in one state, at one place of the run, once.

Before it strikes, it leaves a witness: the proof that it did, and when.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray

from benchmarks.emulated import (
    EmulatedLearner,
    EmulatedSampler,
    EmulatedScorer,
    Emulation,
    Group,
    Scored,
    learner_group,
)
from diffusion.snapshot import Snapshot, digest
from diffusion.trajectory import Chunk, CleanPredictions, Scores, Trajectories
from learner.protocol.runner import Training

WITNESS = "witness"


@dataclass(frozen=True)
class Fault:
    """kind: kill or stop (SIGKILL, SIGSTOP) the process, or what is raised in it; raylet or node: SIGKILL of the raylet
    it runs under, or of all that runs there, if that is not the driver's node."""

    role: str  # sampler, scorer, rank 0, rank 1
    state: str  # idle, serving, publishing, checkpointing
    kind: str | Exception
    folder: str  # where the witness and the processes' ids are left
    epoch: int = 1
    chunk: int = 1

    def here(self, role: str, state: str, epoch: int) -> bool:
        return (role, state, epoch) == (self.role, self.state, self.epoch)

    def came(self, role: str) -> None:
        """A process says under which id it has a role."""
        (Path(self.folder) / f"{role}-{os.getpid()}").touch()

    def strike_the_idle(self) -> None:
        """Strike the youngest process of the role, from another one."""
        files = sorted(Path(self.folder).glob(f"{self.role}-*"), key=lambda file: file.stat().st_mtime_ns)
        self.strike(int(files[-1].name.rpartition("-")[2]))

    def strike(self, victim: int | None = None) -> None:
        """This process or another one, if nobody has struck before."""
        if self.kind in ("raylet", "node") and _on_the_drivers_node():
            return
        try:
            (Path(self.folder) / WITNESS).touch(exist_ok=False)
        except FileExistsError:
            return
        if isinstance(self.kind, Exception):
            raise self.kind
        if self.kind in ("raylet", "node"):
            raylet = psutil.Process(os.getppid())
            workers = raylet.children() if self.kind == "node" else []
            raylet.kill()
            for worker in sorted(workers, key=lambda worker: worker.pid == os.getpid()):
                worker.kill()
        os.kill(victim or os.getpid(), signal.SIGSTOP if self.kind == "stop" else signal.SIGKILL)


def _on_the_drivers_node() -> bool:
    """The driver runs on the head."""
    head = next(node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
    return ray.get_runtime_context().get_node_id() == head


class FaultySampler(EmulatedSampler):
    def __init__(self, emulation: Emulation, fault: Fault) -> None:
        super().__init__(emulation)
        self.fault = fault
        fault.came("sampler")

    def sample(self, chunk: Chunk, snapshot: Snapshot) -> tuple[Trajectories, CleanPredictions]:
        fault, epoch = self.fault, chunk.epoch if chunk.purpose == "train" else -1
        if fault.here("sampler", "publishing", epoch) and digest(self.flat) != snapshot.sha256:
            half = len(self.flat) // 2
            self.flat[:half] = snapshot.flat[:half]
            fault.strike()
        if chunk.index == fault.chunk and fault.role.startswith("rank") and fault.here(fault.role, "idle", epoch):
            fault.strike_the_idle()
        made = super().sample(chunk, snapshot)
        anywhere = fault.kind in ("raylet", "node")
        if (anywhere or chunk.index == fault.chunk) and fault.here("sampler", "serving", epoch):
            fault.strike()
        return made


class FaultyScorer(EmulatedScorer):
    def __init__(self, emulation: Emulation, fault: Fault) -> None:
        super().__init__(emulation)
        self.fault = fault
        fault.came("scorer")

    def score(self, clean: CleanPredictions) -> Scores:
        scores, chunk, fault = super().score(clean), clean.chunk, self.fault
        epoch = chunk.epoch if chunk.purpose == "train" else -1
        if chunk.index == fault.chunk and fault.here("scorer", "serving", epoch):
            fault.strike()
        return scores


class FaultyLearner(EmulatedLearner):
    def __init__(self, emulation: Emulation, fault: Fault, files: dict[str, bytes] | None) -> None:
        group = learner_group()
        self.fault, self.role, self.epoch = fault, f"rank {group.rank}", -1
        super().__init__(emulation, Interrupted(group, self._between_updates), files)
        fault.came(self.role)

    def train_epoch(self, epoch: int, beta: float, updates: Sequence[Sequence[Scored]]) -> Training:
        self.epoch, self.group.sums = epoch, 0
        others = self.fault.role in ("sampler", "scorer")
        if others and self.group.rank == 0 and self.fault.here(self.fault.role, "idle", epoch):
            self.fault.strike_the_idle()
        return super().train_epoch(epoch, beta, updates)

    def _between_updates(self) -> None:
        if self.fault.here(self.role, "serving", self.epoch):
            self.fault.strike()

    def publish(self, version: int) -> Snapshot:
        fresh = super().publish(version)
        if self.fault.here(self.role, "publishing", version - 1):
            self.fault.strike()
        return fresh

    def state_files(self) -> dict[str, bytes]:
        files = super().state_files()
        if self.fault.here(self.role, "checkpointing", self.published.version - 1):
            self.fault.strike()
        return files


class Interrupted:
    """A group, and something that happens after each but the first update of an epoch has met the other ranks."""

    def __init__(self, group: Group, interruption: Callable[[], None]) -> None:
        self.rank, self.sums = group.rank, 0
        self._group, self._interruption = group, interruption

    def sum(self, numbers: Any) -> Any:
        self.sums += 1
        if self.sums > 1:
            self._interruption()
        return self._group.sum(numbers)


def parts(emulation: Emulation, fault: Fault) -> Any:
    """In the place of learner.build.parts."""
    from learner.build import Parts

    return Parts(
        partial(FaultySampler, emulation, fault), partial(FaultyScorer, emulation, fault),
        partial(FaultyLearner, emulation, fault),
    )  # fmt: skip
