"""A run without a fault, and one that suffers one."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import injected
import pytest
from emulated_run import SETTINGS, outcome, use_emulated_parts
from injected import WITNESS

from learner import build, run

PROCESSES = 4  # that must get their turn before a fault is noticed: raylet, control store, actor, driver


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The outcome of a run over emulated parts without a fault."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    with pytest.MonkeyPatch.context() as patched:
        use_emulated_parts(patched)
        assert run.main([*SETTINGS, "run.runner=inprocess", f"run.dir={folder}"]) == 0
    return outcome(folder)


@dataclass(frozen=True)
class Broken:
    """A run that suffered a fault, which has struck."""

    status: int
    said: list[tuple[float, str]]  # when, what
    struck: float
    lateness: float  # of this machine at most: others may be at work on it

    @property
    def complaints(self) -> list[str]:
        return [text.removeprefix("complaint: ") for _, text in self.said if text.startswith("complaint: ")]

    def assert_noticed(self, limit: float) -> None:
        """Within so many seconds on a machine that is in time."""
        words = ("replacing", "anew", "complaint: ")
        seconds = next(when for when, text in self.said if any(word in text for word in words)) - self.struck
        print(f"noticed after {seconds:.2f} s of {limit:g} s, on a machine {self.lateness:.2f} s late")
        assert seconds < limit + PROCESSES * self.lateness


@pytest.fixture
def break_a_run(cluster, tmp_path, monkeypatch):
    """Run on Ray, in tmp_path/run, with a fault injected into these parts."""
    said = []
    monkeypatch.setattr(run, "say", lambda text: said.append((time.time(), text)))
    monkeypatch.setattr(run, "complain", lambda text: said.append((time.time(), f"complaint: {text}")))

    def go(parts, fault, *settings: str) -> Broken:
        monkeypatch.setattr(build, "parts", lambda config, own_reward=None: injected.parts(parts, fault))
        with watched() as late:
            status = run.main([*SETTINGS, f"run.dir={tmp_path / 'run'}", *settings])
        print("\n".join(f"{when:.2f} {text}" for when, text in said))
        return Broken(status, said, (tmp_path / WITNESS).stat().st_mtime, max(late))

    return go


@contextmanager
def watched() -> Iterator[list[float]]:
    """How late this machine is in doing what it is asked to do at a time, again and again while this is entered."""
    over, late = threading.Event(), [0.0]

    def watch() -> None:
        while not over.is_set():
            then = time.monotonic() + 0.05
            time.sleep(0.05)
            late.append(time.monotonic() - then)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield late
    over.set()
    thread.join(5)
