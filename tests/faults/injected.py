"""One fault, injected into a run: in one role, in one state, at one place, once; around emulated parts or real ones.

Before it strikes, it leaves a witness: the proof that it did, and when.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray

from diffusion.snapshot import Snapshot, digest
from diffusion.trajectory import Chunk

if TYPE_CHECKING:  # an actor of emulated parts needs no torch
    from learner.build import Parts

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

    def at(self, chunk: Chunk, role: str, state: str) -> bool:
        """Whether a call for this chunk is the place; of a raylet or node any chunk of the epoch will do."""
        right = chunk.index == self.chunk or self.kind in ("raylet", "node")
        return right and self.here(role, state, training_epoch(chunk))

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


def training_epoch(chunk: Chunk) -> int:
    return chunk.epoch if chunk.purpose == "train" else -1


def _on_the_drivers_node() -> bool:
    """The driver runs on the head."""
    head = next(node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
    return ray.get_runtime_context().get_node_id() == head


class Around:
    """A part with a fault: whatever is not struck is the part's own."""

    def __init__(self, build: Any, fault: Fault, *state: Any) -> None:
        self.part, self.fault = build(*state), fault
        fault.came(self.role)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)


class SamplerAround(Around):
    role, loaded = "sampler", ""

    def sample(self, chunk, snapshot):
        fault = self.fault
        if fault.here("sampler", "publishing", training_epoch(chunk)) and self.loaded != snapshot.sha256:
            half = snapshot.flat.copy()
            half[len(half) // 2 :] = 0
            self.part.sample(chunk, Snapshot(snapshot.version, half, digest(half)))  # half of it has arrived
            fault.strike()
        if fault.role.startswith("rank") and fault.at(chunk, fault.role, "idle"):
            fault.strike_the_idle()
        sampled = self.part.sample(chunk, snapshot)
        self.loaded = snapshot.sha256
        if fault.at(chunk, "sampler", "serving"):
            fault.strike()
        return sampled


class ScorerAround(Around):
    role = "scorer"

    @property
    def batch(self):
        return self.part.batch

    @batch.setter
    def batch(self, size):
        self.part.batch = size

    def score(self, clean):
        scores = self.part.score(clean)
        if self.fault.at(clean.chunk, "scorer", "serving"):
            self.fault.strike()
        return scores


class LearnerAround(Around):
    def __init__(self, build: Any, fault: Fault, *state: Any) -> None:
        super().__init__(build, fault, *state)
        train_update = self.part._train

        def train(epoch, index, *rest):
            if index > 0 and fault.here(self.role, "serving", epoch):  # the first update has met the other ranks
                fault.strike()
            return train_update(epoch, index, *rest)

        self.part._train = train

    @property
    def role(self) -> str:
        return f"rank {self.part.rank}"

    def train_epoch(self, epoch, beta, updates, offset):
        others = self.fault.role in ("sampler", "scorer")
        if others and self.part.rank == 0 and self.fault.here(self.fault.role, "idle", epoch):
            self.fault.strike_the_idle()
        return self.part.train_epoch(epoch, beta, updates, offset)

    def publish(self, version):
        fresh = self.part.publish(version)
        if self.fault.here(self.role, "publishing", version - 1):
            self.fault.strike()
        return fresh

    def state_files(self):
        files = self.part.state_files()
        if self.fault.here(self.role, "checkpointing", self.part.published.version - 1):
            self.fault.strike()
        return files


def parts(whole: Parts, fault: Fault) -> Parts:
    """In the place of what learner.build.parts returns: the same with the fault."""
    return replace(
        whole,
        sampler=partial(SamplerAround, whole.sampler, fault),
        scorer=partial(ScorerAround, whole.scorer, fault),
        learner=partial(LearnerAround, whole.learner, fault),
    )
