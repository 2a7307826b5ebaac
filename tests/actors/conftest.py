"""One local Ray for the tests of a module that need none of their own."""

import os
from pathlib import Path

import pytest

from cluster.session import Session


@pytest.fixture(scope="module")
def cluster():
    """One local Ray for all the runs here; each run kills its own actors. Its workers find faulty.py."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        session = Session(1)
        yield session
        session.close()
