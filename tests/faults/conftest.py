"""One local Ray for the runs of a module that need none of their own."""

import os
from pathlib import Path

import pytest

from cluster.session import Session
from learner.config import ROOT


@pytest.fixture(scope="module")
def cluster():
    """Each run kills its own actors. Workers find emulated_faults.py and benchmarks/."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]), prepend=os.pathsep)
        session = Session(1)
        yield session
        session.close()
