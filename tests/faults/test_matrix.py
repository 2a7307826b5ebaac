"""The kill matrix: role x state x kind of fault. Each cell ends as if nothing had been, or in a typed error; each has a
witness that the fault struck, and a deadline for its being noticed."""

from dataclasses import dataclass

import pytest
from emulated_run import outcome, totals
from injected import Fault

from benchmarks import emulated
from benchmarks.emulated import Emulation
from diffusion.gpu_memory import OutOfMemory
from learner.process_group import GroupBroken
from learner.update import NonFiniteGradient
from rewards.scorer import BadReward

pytestmark = [pytest.mark.faults, pytest.mark.ray]

SHORTEST = "sampler-serving-kill"  # in `make test`; of the others see `make test-long`
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
    def ranks(self) -> int:
        return 2 if self.role.startswith("rank") else 1

    def timing(self, chunk_seconds: float, train_seconds: float) -> tuple[list[str], float]:
        """Settings, and seconds from the fault until the driver says so, by these deadlines of a stopped process."""
        ranks = [f"learner.ranks={self.ranks}"]
        if self.kind != "stop":
            return ranks, 2.0
        seconds = train_seconds if self.ranks > 1 and self.state != "idle" else chunk_seconds
        return [*ranks, f"run.chunk_seconds={chunk_seconds}", f"run.train_seconds={train_seconds}"], 1.0 + seconds


def cells():
    at_work = {role: [error] for role, error in DATA.items()}
    for rank in ("rank 0", "rank 1"):
        at_work[rank].append(GroupBroken("injected: a peer is gone"))
    for role, state in [(role, state) for role, states in STATES.items() for state in states]:
        for kind in ["kill", "stop", *(at_work[role] if state != "idle" else ())]:
            cell = Cell(role, state, kind)
            marks = [pytest.mark.long] if cell.name in ORDINARY else [pytest.mark.slow]
            yield pytest.param(cell, id=cell.name, marks=[] if cell.name == SHORTEST else marks)


@pytest.mark.parametrize("cell", cells())
def test_cell(cell, break_a_run, unbroken, tmp_path):
    fault = Fault(cell.role, cell.state, cell.kind, str(tmp_path))
    (settings, limit), emulation = cell.timing(chunk_seconds=2, train_seconds=3), Emulation()
    if cell.state == "idle" and cell.ranks == 1:  # a long training: the idle are asked meanwhile
        emulation, settings = Emulation(train_seconds=4.0), [*settings, "run.train_seconds=30"]
    broken = break_a_run(emulated.parts(emulation), fault, *settings)
    broken.assert_noticed(limit)
    if cell.typed:
        (complaint,) = broken.complaints
        assert broken.status == 1 and complaint.startswith(f"{cell.typed}: injected") and "\n" not in complaint
        assert "the same command goes on" in complaint
        return
    assert broken.status == 0
    assert outcome(tmp_path / "run") == unbroken
    if cell.role == "sampler" and cell.kind == "kill" and cell.state != "idle":
        # The chunk of four that it was at, and perhaps the one that was queued with it.
        assert totals(tmp_path / "run")["lost"] in (4, 8)
    elif cell.kind == "kill":
        assert totals(tmp_path / "run")["lost"] == 0


@pytest.mark.long
def test_a_rank_lost_before_there_is_a_checkpoint(break_a_run, unbroken, tmp_path):
    fault = Fault("rank 1", "checkpointing", "kill", str(tmp_path), epoch=-1)
    assert break_a_run(emulated.parts(Emulation()), fault).status == 0
    assert outcome(tmp_path / "run") == unbroken
