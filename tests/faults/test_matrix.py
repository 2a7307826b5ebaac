"""The kill matrix: role x state x kind of fault. Each cell ends as if nothing had been, or in a typed error; each has a
witness that the fault struck, and a deadline for its being noticed."""

import threading
import time
from dataclasses import dataclass

import emulated_faults
import pytest
from emulated_faults import WITNESS, Fault
from emulated_run import SETTINGS, lost, outcome

from benchmarks import emulated
from benchmarks.emulated import Emulation
from diffusion.gpu_memory import OutOfMemory
from learner import build, run
from learner.process_group import GroupBroken
from learner.update import NonFiniteGradient
from rewards.scorer import BadReward

pytestmark = [pytest.mark.faults, pytest.mark.ray]

CHUNK_SECONDS, TRAIN_SECONDS = 2, 3  # deadlines of the cells with a stopped process
PROCESSES = 4  # that must get their turn before a fault is noticed: raylet, control store, actor, driver
SHORTEST = ("sampler-serving-kill", "rank_0-publishing-kill")  # in `make test`; of the others see `make test-long`
ORDINARY = (
    "sampler-idle-kill", "sampler-idle-stop", "sampler-serving-kill", "sampler-serving-stop",
    "sampler-serving-OutOfMemory", "sampler-publishing-kill", "scorer-idle-kill", "scorer-serving-kill",
    "scorer-serving-stop", "scorer-serving-BadReward", "rank_0-idle-kill", "rank_0-serving-kill",
    "rank_0-serving-NonFiniteGradient", "rank_0-publishing-kill", "rank_0-checkpointing-kill", "rank_1-serving-stop",
    "rank_1-serving-GroupBroken",
)  # fmt: skip
STATES = {
    "sampler": ("idle", "serving", "publishing"), "scorer": ("idle", "serving"),
    "rank 0": ("idle", "serving", "publishing", "checkpointing"),
    "rank 1": ("idle", "serving", "publishing", "checkpointing"),
}  # fmt: skip
DATA = {
    "sampler": OutOfMemory("injected: no room for a chunk"),
    "scorer": BadReward("injected: nan"),
    "rank 0": NonFiniteGradient("injected: inf"),
    "rank 1": NonFiniteGradient("injected: inf"),
}


@dataclass(frozen=True)
class Cell:
    role: str
    state: str
    kind: str | Exception

    @property
    def name(self) -> str:
        kind = self.kind if isinstance(self.kind, str) else type(self.kind).__name__
        return f"{self.role.replace(' ', '_')}-{self.state}-{kind}"

    @property
    def typed(self) -> str | None:
        """The class of error that the run ends with: data that would be no better a second time."""
        data = isinstance(self.kind, Exception) and not isinstance(self.kind, GroupBroken)
        return type(self.kind).__name__ if data else None

    @property
    def settings(self) -> list[str]:
        ranks = [f"learner.ranks={2 if self.role.startswith('rank') else 1}"]
        if self.kind != "stop":
            return ranks
        return [*ranks, f"run.chunk_seconds={CHUNK_SECONDS}", f"run.train_seconds={TRAIN_SECONDS}"]

    @property
    def limit(self) -> float:
        """Seconds from the fault until the driver says so."""
        if self.kind != "stop":
            return 2.0
        at_work_as_rank = self.role.startswith("rank") and self.state != "idle"
        return 1.0 + (TRAIN_SECONDS if at_work_as_rank else CHUNK_SECONDS)


def cells():
    for role, state in [(role, state) for role, states in STATES.items() for state in states]:
        kinds = ["kill", "stop"]
        if state != "idle":
            kinds.append(DATA[role])
            if role.startswith("rank"):
                kinds.append(GroupBroken("injected: a peer is gone"))
        for kind in kinds:
            cell = Cell(role, state, kind)
            marks = [pytest.mark.long] if cell.name in ORDINARY else [pytest.mark.slow]
            yield pytest.param(cell, id=cell.name, marks=[] if cell.name in SHORTEST else marks)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build, "parts", lambda config, own_reward=None: emulated.parts(Emulation()))
        folder = tmp_path_factory.mktemp("runs") / "unbroken"
        assert run.main([*SETTINGS, "run.runner=inprocess", f"run.dir={folder}"]) == 0
    return outcome(folder)


class Lateness:
    """How late this machine is at most in doing what it is asked to do at a time: others may be at work on it."""

    def __init__(self) -> None:
        self.most, self._over = 0.0, threading.Event()
        self._watch = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Lateness":
        self._watch.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._watch.join(5)

    def _sample(self) -> None:
        while not self._over.is_set():
            then = time.monotonic() + 0.05
            time.sleep(0.05)
            self.most = max(self.most, time.monotonic() - then)


@pytest.fixture
def break_a_run(cluster, tmp_path, monkeypatch):
    """Run with a fault, on Ray: (exit status, [(time, line)] of what was said)."""
    said = []
    monkeypatch.setattr(run, "say", lambda text: said.append((time.time(), text)))
    monkeypatch.setattr(run, "complain", lambda text: said.append((time.time(), f"complaint: {text}")))

    def go(fault: Fault, *settings: str, train_seconds: float = 0.0):
        emulation = Emulation(train_seconds=train_seconds)
        monkeypatch.setattr(build, "parts", lambda config, own_reward=None: emulated_faults.parts(emulation, fault))
        status = run.main([*SETTINGS, f"run.dir={tmp_path / 'run'}", *settings])
        print("\n".join(f"{when:.2f} {text}" for when, text in said))
        return status, said

    return go


def noticed(said, witness) -> float:
    """Seconds from the fault until the driver said so."""
    struck = witness.stat().st_mtime
    words = ("replacing", "anew", "complaint: ")
    return next(when for when, text in said if any(word in text for word in words)) - struck


@pytest.mark.parametrize("cell", cells())
def test_cell(cell, break_a_run, unbroken, tmp_path):
    fault = Fault(cell.role, cell.state, cell.kind, str(tmp_path))
    slow_training = cell.state == "idle" and not cell.role.startswith("rank")
    with Lateness() as lateness:
        if slow_training:  # so that the idle are asked meanwhile
            status, said = break_a_run(fault, *cell.settings, "run.train_seconds=30", train_seconds=4.0)
        else:
            status, said = break_a_run(fault, *cell.settings)
    assert (tmp_path / WITNESS).exists()
    seconds = noticed(said, tmp_path / WITNESS)
    print(f"{cell.name}: noticed after {seconds:.2f} s of {cell.limit:g} s, on a machine {lateness.most:.2f} s late")
    assert seconds < cell.limit + PROCESSES * lateness.most
    if cell.typed:
        complaints = [text for _, text in said if text.startswith("complaint: ")]
        assert status == 1 and len(complaints) == 1 and "\n" not in complaints[0]
        assert complaints[0].startswith(f"complaint: {cell.typed}: injected")
        assert "the same command goes on" in complaints[0]
        return
    assert status == 0
    assert outcome(tmp_path / "run") == unbroken
    if cell.role == "sampler" and cell.kind == "kill" and cell.state != "idle":
        # The chunk of four that it was at, and perhaps the one that was queued with it.
        assert lost(tmp_path / "run") in (4, 8)
    elif cell.kind == "kill":
        assert lost(tmp_path / "run") == 0


@pytest.mark.long
def test_a_rank_lost_before_there_is_a_checkpoint(break_a_run, unbroken, tmp_path):
    status, _ = break_a_run(Fault("rank 1", "checkpointing", "kill", str(tmp_path), epoch=-1))
    assert (tmp_path / WITNESS).exists() and status == 0
    assert outcome(tmp_path / "run") == unbroken
