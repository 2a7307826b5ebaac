"""The lock on a run: one process writes it. The kernel drops the lock with its process. Object stores have none."""

from __future__ import annotations

import os
import socket

from filelock import FileLock, Timeout

from records.storage import Storage, StorageError

FILE = "run.lock"  # names the process that last wrote the run


def take(storage: Storage) -> FileLock | None:
    """Lock the run in a local folder, which is made if need be. Raises a StorageError if another process has it."""
    if storage.local is None:
        return None
    path = storage.local / FILE
    lock = FileLock(path, blocking=False, mode=0o644, fallback_to_soft=False)
    try:
        storage.local.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    except Timeout:
        owner = path.read_text(errors="replace").strip()
        raise StorageError(f"{storage} is in use by {owner}; wait for it, or choose another") from None
    except OSError as error:
        raise StorageError(f"cannot write {storage}: {error.strerror}") from error
    return lock


def in_use(storage: Storage) -> bool:
    """Whether a process is writing this run."""
    if storage.local is None or not (storage.local / FILE).exists():
        return False
    try:
        with FileLock(storage.local / FILE, blocking=False, fallback_to_soft=False):
            return False
    except (Timeout, OSError):
        return True
