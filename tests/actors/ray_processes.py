"""Processes of one Ray session, told by its temporary folder, which is on all their command lines or environments."""

import contextlib
import time

import psutil


def of(folder: str) -> list[str]:
    """Command lines of the living processes that belong to the session under `folder`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            line = " ".join(process.cmdline())
            if folder in line or (line.startswith("ray::") and process.environ().get("RAY_TMPDIR") == folder):
                found.append(line)
    return found


def all_gone(folder: str, seconds: float = 10) -> bool:
    """Whether none is left within `seconds`."""
    deadline = time.monotonic() + seconds
    while found := of(folder):
        if time.monotonic() > deadline:
            print("\n".join(found))
            return False
        time.sleep(0.2)
    return True
