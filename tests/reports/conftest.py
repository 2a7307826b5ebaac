"""One made-up run for all tests of what is made of a run's records."""

import shutil
from pathlib import Path

import pytest
from made_up_run import made_up_run


@pytest.fixture(scope="session")
def made_up(tmp_path_factory) -> Path:
    return made_up_run(tmp_path_factory.mktemp("runs") / "made-up")


@pytest.fixture
def copied(made_up, tmp_path) -> Path:
    """The same, to be changed; with a blank in its name."""
    return shutil.copytree(made_up, tmp_path / "a run")


@pytest.fixture(scope="session")
def tables(shared) -> Path:
    """A database with MLflow's tables, which take it many seconds to make."""

    def make(folder: Path) -> None:
        import mlflow

        mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()

    return shared("tables", make) / "mlflow.db"
