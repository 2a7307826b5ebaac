"""The cells of the kill matrix once more, around the embedded model's own parts: `make faults-shapes`."""

import functools

import pytest
from emulated_run import SETTINGS, outcome
from injected import Fault
from test_matrix import cells

from learner import build, run
from learner.config import load_config

pytestmark = [pytest.mark.shapes, pytest.mark.ray]

SMALLER = ("sampler.steps=4", "learner.micro_batch=16", "flow.warmup_steps=2", "flow.fit_steps=2", "flow.batch=8")


@pytest.fixture(scope="module")
def unbroken(cluster, tmp_path_factory):
    """By number of ranks: theirs have other last bits."""

    @functools.cache
    def go(ranks):
        folder = tmp_path_factory.mktemp("runs") / "unbroken"
        assert run.main([*SETTINGS, *SMALLER, f"learner.ranks={ranks}", f"run.dir={folder}"]) == 0
        return outcome(folder)

    return go


@pytest.mark.parametrize("cell", [pytest.param(*cell.values, id=cell.id) for cell in cells()])
def test_cell(cell, break_a_run, unbroken, tmp_path):
    expected = None if cell.typed else unbroken(cell.ranks)
    settings, limit = cell.timing(chunk_seconds=10, train_seconds=20)
    parts = build.parts(load_config(overrides=[*SETTINGS, *SMALLER, *settings]))
    fault = Fault(cell.role, cell.state, cell.kind, str(tmp_path))
    broken = break_a_run(parts, fault, *SMALLER, *settings)
    if cell.typed:
        assert broken.status == 1 and any(text.startswith(f"{cell.typed}: injected") for text in broken.complaints)
        return
    assert broken.status == 0 and outcome(tmp_path / "run") == expected
    if cell.kind == "stop" and cell.state == "idle" and cell.role in ("sampler", "scorer"):
        return  # the epoch may be over before its deadline: it is replaced in the next one, or never missed
    broken.assert_noticed(limit)
