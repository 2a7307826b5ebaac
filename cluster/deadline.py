"""A deadline for work in this very process, where no other one looks on (run.runner=inprocess). Standard library alone:
no Ray."""

import contextlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import FrameType

from cluster import signals
from diffusion.failures import DeadlineExceeded

AGAIN_SECONDS = 1.0
HARD_SECONDS = 10.0


@contextlib.contextmanager
def within(seconds: float, what: str, setting: str) -> Iterator[None]:
    """Raises DeadlineExceeded in here after `seconds`, and then again and again: a reward may catch whatever is raised.
    Where Python is not come back to in HARD_SECONDS more, as in a call of a library that hangs, it ends the process, if
    that is a command of ours. Only the main thread can be raised in."""
    text = f"{what} took longer than {setting}={seconds:g} s"
    hard = threading.Timer(seconds + HARD_SECONDS, _give_up, (text, threading.get_ident()))
    hard.daemon = True
    hard.start()
    try:
        with (
            _alarm(seconds, text) if threading.current_thread() is threading.main_thread() else contextlib.nullcontext()
        ):
            yield
    finally:
        hard.cancel()


@contextlib.contextmanager
def _alarm(seconds: float, text: str) -> Iterator[None]:
    """Somebody else's alarm goes on afterwards."""

    def expire(signum: int, frame: FrameType | None) -> None:
        raise DeadlineExceeded(text)

    start, theirs = time.monotonic(), signal.signal(signal.SIGALRM, expire)
    left, every = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, theirs)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - start)), every)


def _give_up(text: str, thread: int) -> None:
    at = traceback.extract_stack(sys._current_frames().get(thread))[-1]
    signals.end_hard(f"{text}, in {at.filename}:{at.lineno} ({at.name}), which nothing interrupts")
