"""The kill matrix: role x state x kind of fault. Each cell ends as if nothing had been, or in a typed error; each has a
witness that the fault struck, and a deadline for its being noticed."""

from dataclasses import dataclass

import pytest
from emulated_run import SETTINGS, lost, outcome
from injected import Fault

from benchmarks import emulated
from benchmarks.emulated import Emulation
from diffusion.gpu_memory import OutOfMemory
from learner import build, run
from learner.process_group import GroupBroken
from learner.update import NonFiniteGradient
from rewards.scorer import BadReward

pytestmark = [pytest.mark.faults, pytest.mark.ray]

CHUNK_SECONDS, TRAIN_SECONDS = 2, 3  # deadlines of the cells with a stopped process
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


@pytest.mark.parametrize("cell", cells())
def test_cell(cell, break_a_run, unbroken, tmp_path):
    fault = Fault(cell.role, cell.state, cell.kind, str(tmp_path))
    if cell.state == "idle" and not cell.role.startswith("rank"):  # a long training: the idle are asked meanwhile
        emulation, settings = Emulation(train_seconds=4.0), [*cell.settings, "run.train_seconds=30"]
    else:
        emulation, settings = Emulation(), cell.settings
    broken = break_a_run(emulated.parts(emulation), fault, *settings)
    broken.assert_noticed(cell.limit)
    if cell.typed:
        (complaint,) = broken.complaints
        assert broken.status == 1 and complaint.startswith(f"{cell.typed}: injected") and "\n" not in complaint
        assert "the same command goes on" in complaint
        return
    assert broken.status == 0
    assert outcome(tmp_path / "run") == unbroken
    if cell.role == "sampler" and cell.kind == "kill" and cell.state != "idle":
        # The chunk of four that it was at, and perhaps the one that was queued with it.
        assert lost(tmp_path / "run") in (4, 8)
    elif cell.kind == "kill":
        assert lost(tmp_path / "run") == 0


@pytest.mark.long
def test_a_rank_lost_before_there_is_a_checkpoint(break_a_run, unbroken, tmp_path):
    fault = Fault("rank 1", "checkpointing", "kill", str(tmp_path), epoch=-1)
    assert break_a_run(emulated.parts(Emulation()), fault).status == 0
    assert outcome(tmp_path / "run") == unbroken
