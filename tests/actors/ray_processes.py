"""What belongs to one run and its Ray: told by the temporary folder, in the environment of all its processes."""

import contextlib
import os
import time
from dataclasses import dataclass

import psutil


def wait_for(there, seconds: float, said=lambda: "") -> None:
    """Until `there()`; what was said is shown if it is not in time."""
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline, said()
        time.sleep(0.05)


def processes(folder: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and (
                process.environ().get("RAY_TMPDIR") == folder or folder in " ".join(process.cmdline())
            ):
                found.append(process)
    return found


def of(folder: str) -> list[str]:
    """Command lines of the living processes that belong to the session under `folder`."""
    lines = []
    for process in processes(folder):
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
    return lines


def all_gone(folder: str, seconds: float = 10) -> bool:
    """Whether none is left within `seconds`."""
    deadline = time.monotonic() + seconds
    while found := of(folder):
        if time.monotonic() > deadline:
            print("\n".join(found))
            return False
        time.sleep(0.2)
    return True


@dataclass(frozen=True)
class Traces:
    """What a living run holds of the machine."""

    folder: str
    ports: frozenset[int]
    shared_memory: frozenset[str]  # paths in /dev/shm

    def assert_nothing_left(self, seconds: float = 10) -> None:
        assert all_gone(self.folder, seconds)
        listening = {c.laddr.port for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        assert not self.ports & listening
        assert not os.listdir(self.folder)
        assert not [path for path in self.shared_memory if os.path.exists(path)]


def traces(folder: str) -> Traces:
    """Of the living run with Ray under `folder`."""
    ports, shared_memory = set(), set()
    for process in processes(folder):
        with contextlib.suppress(psutil.Error):
            ports |= {c.laddr.port for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
            shared_memory |= {m.path for m in process.memory_maps() if m.path.startswith("/dev/shm")}
    assert ports and os.listdir(folder)
    return Traces(folder, frozenset(ports), frozenset(shared_memory))
