"""MLflow's database is made once, whoever else starts, and one that is not as it should be is refused with a way on."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time

import mlflow
import pytest

from reports import mlflow_database
from reports.mlflow_database import MlflowError, opened


@pytest.fixture
def database(tables, tmp_path):
    """A copy of a fresh one, at rest."""
    file = tmp_path / "mlflow.db"
    shutil.copyfile(tables, file)
    return rest(file)


def rest(file):
    os.utime(file, (1, 1))
    return file


def change(file, *statements: str):
    with contextlib.closing(sqlite3.connect(file)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return rest(file)


def refused(file) -> str:
    before = file.read_bytes()
    with pytest.raises(MlflowError) as caught, opened(f"sqlite:///{file}"):
        pass
    assert file.read_bytes() == before and "\n" not in str(caught.value)
    return str(caught.value)


def test_one_of_two_that_start_together_makes_it_aside(tables, tmp_path, monkeypatch):
    made, inside, file = [], [], tmp_path / "mlflow.db"
    (tmp_path / "mlflow.db.new").write_bytes(b"of one that was killed while it made it")

    class Client:
        def __init__(self, uri: str) -> None:
            self.aside = uri.removeprefix("sqlite:///")

        def search_experiments(self, **_) -> None:
            assert not os.path.exists(self.aside) and not file.exists()
            time.sleep(0.3)
            made.append(shutil.copyfile(tables, self.aside))

    def start() -> None:
        with opened(f"sqlite:///{file}"):
            inside.append(threading.get_ident())
            time.sleep(0.1)
            assert inside == [threading.get_ident()]
            inside.clear()
            made.append("done")

    monkeypatch.setattr(mlflow, "MlflowClient", Client)
    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert made == [f"{file}.new", "done", "done"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["mlflow.db"]


@pytest.mark.slow
def test_three_processes_that_start_together_find_it_whole(tmp_path):
    """Of MLflow's own first openings two fail, or all later ones do."""
    code = """
import sys
from reports.mlflow_mirror import Mirror
from records.storage import Storage
client = Mirror(Storage(sys.argv[1]), sys.argv[2], "tributary").client
client.create_experiment(sys.argv[3])
"""
    arguments = [sys.executable, "-c", code, str(tmp_path / "run"), f"sqlite:///{tmp_path}/mlflow.db"]
    starts = [subprocess.Popen([*arguments, name]) for name in "abc"]
    assert [start.wait(500) for start in starts] == [0, 0, 0]
    names = {each.name for each in mlflow.MlflowClient(arguments[-1]).search_experiments()}
    assert names == {"Default", "a", "b", "c"}


def test_another_schema_is_not_migrated_and_a_half_made_one_is_said(database):
    half_made = change(database, "create table _alembic_tmp_tags (a)", "update alembic_version set version_num = 'old'")
    text = refused(half_made)
    assert "has the schema old, not " in text and "half made" in text
    assert f"mlflow db upgrade sqlite:///{database}`, or move {database} away, and learner.upload makes it anew" in text
    assert "has the schema None" in refused(change(database, "drop table alembic_version"))


def test_a_file_that_is_no_database_is_moved_away(database):
    database.write_bytes(b"no database at all" * 1000)
    assert "is damaged (file is not a database): move" in refused(database)


def test_one_that_another_program_is_just_making_is_waited_for(tables, database, monkeypatch):
    monkeypatch.setattr(mlflow_database, "AT_REST_SECONDS", 600.0)
    shutil.copyfile(change(database, "update alembic_version set version_num = 'old'"), other := f"{database}.other")
    os.utime(database)
    waited = threading.Timer(0.3, lambda: (shutil.copyfile(tables, other), os.replace(other, database)))
    waited.start()
    with opened(f"sqlite:///{database}"):
        assert waited.finished.is_set()


def test_servers_are_left_alone():
    with opened("http://127.0.0.1:9"):
        pass
