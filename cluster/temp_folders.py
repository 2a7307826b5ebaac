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

from diffusion.failures import RunFailure

PREFIX, MARKER = "tributary-", "owner.pid"
VARIABLE = "TRIBUTARY_FOLDER"  # in the environment of those who work for the owner
GRACE_SECONDS, KILL_SECONDS = 2.0, 5.0  # to end by themselves; to be gone
# Bytes of a Unix socket's path, and those that Ray's longest has beneath the base: PREFIX and 8 letters, r,
# session_2026-11-29_00-14-56_123456_1234567, sockets, plasma_store, each with its slash.
SOCKET_BYTES, BENEATH = 107, 85


class NoTemporaryFolder(RunFailure, OSError):
    """Where temporary folders would be made none can be; the message names the variable that says another place."""


class TemporaryFolder:
    """A folder of our own in RAY_TMPDIR, or /tmp: short, since it holds sockets, whose paths are limited."""

    def __init__(self) -> None:
        """Raises NoTemporaryFolder."""
        sweep()
        try:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=_base()))
        except OSError as error:
            raise NoTemporaryFolder(f"{_base()}: {error.strerror}; set RAY_TMPDIR to a folder of yours") from error
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


def require_room_for_sockets() -> None:
    """Raises NoTemporaryFolder where Ray could not make its sockets; nothing is written."""
    base = _base()
    if not os.access(base, os.W_OK | os.X_OK):
        why = "cannot be written" if base.is_dir() else "is no folder"
        raise NoTemporaryFolder(f"{base} {why}: Ray keeps its sockets there; set RAY_TMPDIR to a short path of yours")
    if (spare := SOCKET_BYTES - BENEATH - len(os.fsencode(base))) < 0:
        raise NoTemporaryFolder(
            f"RAY_TMPDIR: {base} is {-spare} bytes too long for the sockets that Ray keeps there (at most "
            f"{SOCKET_BYTES - BENEATH}): name a shorter one, or unset it to use /tmp"
        )


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
    return Path(os.environ.get("RAY_TMPDIR") or "/tmp").absolute()
