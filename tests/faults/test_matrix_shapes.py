"""The cells of the kill matrix once more, around the embedded model's own parts: `make faults-shapes`."""

import pytest
from emulated_run import SETTINGS, outcome
from injected import Fault
from test_matrix import cells

from learner import build, run
from learner.config import load_config

pytestmark = [pytest.mark.shapes, pytest.mark.ray]

CHUNK_SECONDS, TRAIN_SECONDS = 10, 20  # of the cells with a stopped process
SMALLER = ("sampler.steps=4", "learner.micro_batch=16", "flow.warmup_steps=2", "flow.fit_steps=2", "flow.batch=8")


@pytest.fixture(scope="module")
def unbroken(cluster, tmp_path_factory):
    """By number of ranks: theirs have other last bits."""
    outcomes = {}

    def go(ranks):
        if ranks not in outcomes:
            folder = tmp_path_factory.mktemp("runs") / "unbroken"
            assert run.main([*SETTINGS, *SMALLER, f"learner.ranks={ranks}", f"run.dir={folder}"]) == 0
            outcomes[ranks] = outcome(folder)
        return outcomes[ranks]

    return go


@pytest.mark.parametrize("cell", [pytest.param(*cell.values, id=cell.id) for cell in cells()])
def test_cell(cell, break_a_run, unbroken, tmp_path):
    ranks = 2 if cell.role.startswith("rank") else 1
    expected = None if cell.typed else unbroken(ranks)
    settings, limit = [*SMALLER, f"learner.ranks={ranks}"], 2.0
    if cell.kind == "stop":
        settings += [f"run.chunk_seconds={CHUNK_SECONDS}", f"run.train_seconds={TRAIN_SECONDS}"]
        in_training = cell.role.startswith("rank") and cell.state != "idle"
        limit = 1.0 + (TRAIN_SECONDS if in_training else CHUNK_SECONDS)
    config = load_config(overrides=[*SETTINGS, *settings])
    broken = break_a_run(build.parts(config), Fault(cell.role, cell.state, cell.kind, str(tmp_path)), *settings)
    if cell.typed:
        assert broken.status == 1 and any(text.startswith(f"{cell.typed}: injected") for text in broken.complaints)
        return
    assert broken.status == 0 and outcome(tmp_path / "run") == expected
    if cell.kind == "stop" and cell.state == "idle" and cell.role in ("sampler", "scorer"):
        return  # the epoch may be over before its deadline: it is replaced in the next one, or never missed
    broken.assert_noticed(limit)
