"""Signals that end a run: Ctrl-C, SIGTERM (`ray job stop`, which kills 3 s later) and SIGHUP, from the first moment on.

Standard library alone: it is at work before torch is imported, which takes seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Literal, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
END_SECONDS = 9.0  # for a clean end; then the process goes all the same

_status = 0  # 128 + signal, once one has come
_stage: Literal["starting", "running", "closing"] = "starting"


def watch() -> None:
    """From here on a signal ends this process with one line; after `running`, by raising KeyboardInterrupt in the
    main thread. Only the first one counts: an impatient second Ctrl-C does not break off a clean end."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    threading.Thread(target=_end_hard, args=(told,), daemon=True).start()
    for one in SIGNALS:
        if signal.getsignal(one) is not signal.SIG_IGN:  # nohup
            signal.signal(one, _end)


def running() -> None:
    """Something is about to be started: from here on an end has to be clean."""
    global _stage
    _stage = "running"


def closing() -> None:
    """The clean end has begun, for whatever reason: nothing breaks it off, but those who wait ask `hurry`."""
    global _stage
    _stage = "closing"


def leave(status: int) -> NoReturn:
    """All is done: signals come too late. After one nobody waits for the interpreter's end either, where Ray's handlers
    look once more for what is gone."""
    for one in SIGNALS:
        if signal.getsignal(one) is _end:
            signal.signal(one, signal.SIG_IGN)
    if _status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def hurry() -> bool:
    """Whether a signal has come."""
    return _status > 0


def status() -> int:
    """Exit status after an interrupt: 130 for Ctrl-C, 143 for SIGTERM. The exception cannot tell: Ray makes a
    KeyboardInterrupt of its own of what it meets in a call."""
    return _status or 130


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Around what puts a SIGTERM handler of its own in place, as `ray.init` does. A SIGTERM meanwhile, of which Ray's
    handler makes a SystemExit, is ours again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGTERM, ours)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, ours)


def _end(signum: int, frame: FrameType | None) -> None:
    global _status
    if _status:
        return
    _status = 128 + signum
    if _stage == "starting":
        os.write(2, b"learner.run: interrupted before anything was started\n")
        os._exit(_status)
    if _stage == "running":
        raise KeyboardInterrupt


def _end_hard(told: int) -> None:
    """The main thread may be in a call that knows no signals, the exception be lost (in a destructor), or the end meet
    something that hangs. The interpreter writes the numbers of signals to `told` whatever the main thread is at."""
    while (number := os.read(told, 1)[0]) not in SIGNALS:
        continue
    time.sleep(END_SECONDS)
    os.write(2, b"learner.run: no clean end in time; the same command goes on\n")
    os._exit(128 + number)
