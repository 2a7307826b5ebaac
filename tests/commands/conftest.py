"""What tests of several commands use."""

import importlib
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def run(finished_run, tmp_path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))


@pytest.fixture
def refused(capsys):
    """`refused(verb, *arguments)`: the one line that a command says which ends with status 2."""

    def go(verb: str, *arguments: object) -> str:
        capsys.readouterr()
        assert importlib.import_module(f"commands.{verb}").main([*map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith(f"learner.{verb}: ") and captured.err.count("\n") == 1
        return captured.err

    return go
