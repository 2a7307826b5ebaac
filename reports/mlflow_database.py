"""MLflow's database, a file or another that is opened directly: made once and whole, and never migrated unasked.

MLflow's own first opening is some fifty migrations, which two processes at once, or one that is killed meanwhile, leave
half done for good."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import sqlalchemy
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock
from mlflow.store.db.db_types import DATABASE_ENGINES, SQLITE

from diffusion.failures import RunFailure
from records.heartbeat import without_passwords

MIGRATIONS = Path(mlflow.__file__).with_name("store") / "db_migrations"
LOCK_SECONDS = 300.0  # others make the database, or connect
AT_REST_SECONDS = 5.0  # a file that has not changed for so long is not just being made


class MlflowError(RunFailure):
    """What MLflow cannot be given as things are; the message names the remedy."""


@contextlib.contextmanager
def opened(uri: str) -> Iterator[None]:
    """Whoever finds or makes something there: one process of this machine at a time, if it is a file. Raises an
    MlflowError for a database that is damaged, half made or of another MLflow's schema."""
    if uri.partition(":")[0].partition("+")[0] not in DATABASE_ENGINES:
        yield  # a server: it has the schema that it needs
        return
    url = sqlalchemy.make_url(uri)
    file = Path(url.database) if url.database and url.get_backend_name() == SQLITE else None
    with FileLock(f"{file}.lock", timeout=LOCK_SECONDS) if file else contextlib.nullcontext():
        if file and not _holds(file):
            _make(file)
        _check(url, file)
        yield


def _holds(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _make(file: Path) -> None:
    aside = file.with_name(f"{file.name}.new")
    aside.unlink(missing_ok=True)  # of one that was killed
    mlflow.MlflowClient(f"sqlite:///{aside}").search_experiments(max_results=1)
    if _holds(file):  # `mlflow ui`, which knows no lock, makes one too
        aside.unlink()
    else:
        aside.replace(file)


def _check(url: sqlalchemy.URL, file: Path | None) -> None:
    wanted = ScriptDirectory(str(MIGRATIONS)).get_current_head()
    engine = sqlalchemy.create_engine(
        url, poolclass=sqlalchemy.NullPool
    )  # the file may be another one by the next look
    name, give_up = without_passwords(str(file or url)), time.monotonic() + LOCK_SECONDS
    away = f"move {name} away, and learner.upload makes it anew"
    try:
        while True:
            with engine.connect() as connection:
                revision = MigrationContext.configure(connection).get_current_revision()
                fresh = not sqlalchemy.inspect(connection).get_table_names()
            at_rest = not file or abs(time.time() - file.stat().st_mtime) > AT_REST_SECONDS
            if revision == wanted or (fresh and at_rest):
                return
            if at_rest or time.monotonic() > give_up:
                break
            time.sleep(0.5)
    except sqlalchemy.exc.DatabaseError as error:
        if isinstance(error, sqlalchemy.exc.OperationalError):  # locked, or no file at all
            raise
        raise MlflowError(f"{name} is damaged ({error.orig}): {away}") from error
    upgrade = f"copy it and give `mlflow db upgrade {without_passwords(str(url))}`"
    raise MlflowError(
        f"{name} has the schema {revision}, not {wanted}, of another MLflow or half made: "
        + (f"{upgrade}, or {away}" if file else upgrade)
    )
