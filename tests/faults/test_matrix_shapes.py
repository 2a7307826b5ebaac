"""The cells of the kill matrix once more, around the embedded model's own parts: `make faults-shapes`."""

import time

import pytest
import real_faults
from emulated_faults import WITNESS, Fault
from emulated_run import SETTINGS, outcome
from test_matrix import PROCESSES, Lateness, cells, noticed

from learner import build, run

pytestmark = [pytest.mark.shapes, pytest.mark.ray]

CHUNK_SECONDS, TRAIN_SECONDS = 10, 20  # of the cells with a stopped process
SMALLER = ("sampler.steps=4", "learner.micro_batch=16", "flow.warmup_steps=2", "flow.fit_steps=2", "flow.batch=8")


@pytest.fixture(scope="module")
def unbroken(cluster, tmp_path_factory):
    """By number of ranks: theirs have other last bits."""
    found = {}

    def go(ranks):
        if ranks not in found:
            folder = tmp_path_factory.mktemp("runs") / "unbroken"
            assert run.main([*SETTINGS, *SMALLER, f"learner.ranks={ranks}", f"run.dir={folder}"]) == 0
            found[ranks] = outcome(folder)
        return found[ranks]

    return go


@pytest.mark.parametrize("cell", [pytest.param(*one.values, id=one.id) for one in cells()])
def test_cell(cell, cluster, unbroken, tmp_path, monkeypatch):
    ranks = 2 if cell.role.startswith("rank") else 1
    expected = None if cell.typed else unbroken(ranks)
    said = []
    monkeypatch.setattr(run, "say", lambda text: said.append((time.time(), text)))
    monkeypatch.setattr(run, "complain", lambda text: said.append((time.time(), f"complaint: {text}")))
    fault = Fault(cell.role, cell.state, cell.kind, str(tmp_path))
    monkeypatch.setattr(build, "parts", lambda config: real_faults.parts(config, fault))
    settings, limit = [f"learner.ranks={ranks}"], 2.0
    if cell.kind == "stop":
        settings += [f"run.chunk_seconds={CHUNK_SECONDS}", f"run.train_seconds={TRAIN_SECONDS}"]
        in_training = cell.role.startswith("rank") and cell.state != "idle"
        limit = 1.0 + (TRAIN_SECONDS if in_training else CHUNK_SECONDS)
    with Lateness() as lateness:
        status = run.main([*SETTINGS, *SMALLER, f"run.dir={tmp_path / 'run'}", *settings])
    print("\n".join(f"{when:.2f} {text}" for when, text in said))
    assert (tmp_path / WITNESS).exists()
    if cell.typed:
        assert status == 1 and any(f"{cell.typed}: injected" in text for _, text in said)
        return
    assert status == 0 and outcome(tmp_path / "run") == expected
    if cell.kind == "stop" and cell.state == "idle" and cell.role in ("sampler", "scorer"):
        return  # the epoch may be over before its deadline: it is replaced in the next one, or never missed
    seconds = noticed(said, tmp_path / WITNESS)
    print(f"{cell.name}: noticed after {seconds:.2f} s of {limit:g} s, on a machine {lateness.most:.2f} s late")
    assert seconds < limit + PROCESSES * lateness.most
