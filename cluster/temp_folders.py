"""Temporary folders that are removed with their process: at its end, or, if it was killed, when the next one starts.
The owner holds a lock on its folder, which the kernel releases with the process. Processes that work for the owner have
the folder's name in their environment, and end with it."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

PREFIX, MARKER = "tributary-", "owner.pid"
VARIABLE = "TRIBUTARY_FOLDER"  # in the environment of those who work for the owner
GRACE_SECONDS, KILL_SECONDS = 2.0, 5.0  # to end by themselves; to be gone


class TemporaryFolder:
    """A folder of our own in RAY_TMPDIR, or /tmp: short, since it holds sockets, whose paths are limited."""

    def __init__(self) -> None:
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_base()))
        self.mark = {VARIABLE: str(self.path)}  # for the environment of a process that works for the owner
        self._lock: int | None = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.path / MARKER).write_text(f"{os.getpid()}\n")  # without it `sweep` leaves the folder alone

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """Processes started meanwhile, and theirs, work for this folder's owner."""
        os.environ.update(self.mark)
        try:
            yield
        finally:
            os.environ.pop(VARIABLE, None)

    def remove(self) -> None:
        """And end the processes that work for us. Safe to call twice."""
        if self._lock is not None:
            _remove(self.path)
            os.close(self._lock)
            self._lock = None


def sweep() -> None:
    """Remove the folders of owners that are gone."""
    for path in _base().glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, another user's, or gone a moment ago
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.getuid() and (path / MARKER).is_file():
                    _remove(path)
            finally:
                os.close(lock)


def end_processes(path: Path, grace: float) -> None:
    """Those that work for the folder's owner, if any is left after `grace` seconds."""
    mark, processes = (VARIABLE, str(path)), psutil.process_iter(["environ"])  # None of another user's
    working = [each for each in processes if mark in (each.info["environ"] or {}).items() and each.pid != os.getpid()]
    _, left = psutil.wait_procs(working, timeout=grace)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=KILL_SECONDS)


def _remove(path: Path) -> None:
    end_processes(path, GRACE_SECONDS)
    shutil.rmtree(path, ignore_errors=True)


def _base() -> Path:
    return Path(os.environ.get("RAY_TMPDIR") or "/tmp")
