"""Signals that end a run: Ctrl-C, SIGTERM (`ray job stop`, which kills 3 s later) and SIGHUP. Standard library alone:
it is active before torch is imported, which takes seconds."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Literal, NoReturn, TextIO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
END_SECONDS = 9.0  # for a clean end; then the process goes all the same

_status = 0  # 128 + signal, once one has come
_stage: Literal["starting", "running", "closing"] = "starting"
_program: str | None = None  # that this process is, once signals are watched; for messages


def watch(program: str) -> None:
    """From here on a signal ends this process, `program`, with one line; after `running`, by raising KeyboardInterrupt
    in the main thread. Only the first one counts: a second Ctrl-C does not interrupt the clean end."""
    global _program
    _program = program
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_hard, args=(reader,), daemon=True).start()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _end)


def enter(stage: Literal["running", "closing"]) -> None:
    """Something is about to be started: from here on an end has to be clean. Or that has begun, for whatever reason:
    nothing interrupts it, but what waits asks for the `status`."""
    global _stage
    _stage = stage


def leave_with(work: Callable[[], int]) -> NoReturn:
    """Exit with the status of `work`; quietly, as `head` expects it, where nobody reads what it prints any more."""
    try:
        try:
            status = work()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not poll.poll(0):  # that was another pipe
            raise
        hush(sys.stdout)
        status = 128 + signal.SIGPIPE
    leave(status)


def hush(stream: TextIO) -> None:
    """Nobody reads it: what is still written to it goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave(status: int) -> NoReturn:
    """Exit: signals are ignored from here on. After one, without the interpreter's own end, where Ray's handlers would
    look once more for processes that are gone."""
    for number in (number for number in SIGNALS if signal.getsignal(number) is _end):
        signal.signal(number, signal.SIG_IGN)
    if _status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def end_hard(why: str) -> None:
    """Say it and, where this process is a command of ours, end it here and now with exit status 1."""
    os.write(2, f"{_program or 'learner.train'}: {why}\n".encode(errors="backslashreplace"))
    if _program:
        os._exit(1)


def status(before_any: int = 130) -> int:
    """Exit status after an interrupt: 130 for Ctrl-C, 143 for SIGTERM. The exception cannot tell: Ray makes a
    KeyboardInterrupt of its own of what it meets in a call. `before_any` signal has come: that."""
    return _status or before_any


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Around what installs a SIGTERM handler of its own, as `ray.init` does. A SIGTERM meanwhile, which Ray's handler
    turns into SystemExit, is raised again for ours."""
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
        os.write(2, f"{_program}: interrupted before anything was started\n".encode())
        os._exit(_status)
    if _stage == "running":
        raise KeyboardInterrupt


def _end_hard(reader: int) -> None:
    """The main thread may be in a call that no signal interrupts, the exception may be lost (in a destructor), or the
    clean end may hang. The interpreter writes the numbers of signals to the pipe whatever the main thread does."""
    while (number := os.read(reader, 1)[0]) not in SIGNALS:
        continue
    time.sleep(END_SECONDS)
    os.write(2, f"{_program}: no clean end in time; the same command goes on\n".encode())
    os._exit(128 + number)
