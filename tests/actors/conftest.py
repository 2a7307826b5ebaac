"""One local Ray for the tests of a module that need none of their own."""

import os
from pathlib import Path

import pytest
from fake_pool import World

from actors import pool as pool_module
from cluster.session import Session
from learner.config import ROOT


@pytest.fixture(scope="module")
def cluster():
    """One local Ray for all the runs here; each run kills its own actors. Workers find faulty.py and benchmarks/."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]), prepend=os.pathsep)
        session = Session(1)
        yield session
        session.close()


@pytest.fixture
def world(monkeypatch):
    world = World()
    monkeypatch.setattr(pool_module, "done", world.done_of)
    monkeypatch.setattr(pool_module, "get", world.get)
    monkeypatch.setattr(pool_module.ray, "kill", world.kill)
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: world.now)
    return world
