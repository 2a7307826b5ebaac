"""One made-up run and one real one, for all tests of what is made of a run's records."""

import contextlib
import io
import shutil
from pathlib import Path

import pytest
from made_up_run import made_up_run

from learner.run import main


@pytest.fixture(scope="session")
def made_up(tmp_path_factory) -> Path:
    """Not to be changed."""
    return made_up_run(tmp_path_factory.mktemp("runs") / "made-up")


@pytest.fixture
def copied(made_up, tmp_path) -> Path:
    """The same, to be changed; with a blank in its name."""
    return shutil.copytree(made_up, tmp_path / "a run")


@pytest.fixture(scope="session")
def real(small_settings, tmp_path_factory) -> tuple[list[str], Path, list[str]]:
    """Settings, folder and printed lines of a run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = [*small_settings, "run.runner=inprocess", f"run.dir={folder}", "evaluation.held_out=[shapes_accuracy]"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(settings) == 0
    return settings, folder, out.getvalue().splitlines()
