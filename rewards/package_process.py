"""A worker process at the other end of two pipes, and no wait for it without a deadline.

A frame is magic, two lengths, a JSON header and raw bytes, each way. What the worker writes to stderr goes to a file
without a name, so that it never blocks on it, and its last lines are in every error.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from typing import IO, Any

from rewards.package_worker import FRAME, MAGIC

HEADER_LIMIT = 1 << 20
PIECE = 1 << 20
LINES_SHOWN = 8
SECONDS_TO_END = 5.0


class PackageFailed(RuntimeError):
    """The worker raised, ended, answered nonsense or nothing in time; the message has its last words and the remedy."""


class PackageProcess:
    """One worker. After an error it is gone."""

    def __init__(self, command: Sequence[str], label: str) -> None:
        """`label` names the reward in errors.

        Raises:
            PackageFailed: the command cannot be started.
        """
        self.label = label
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        # Nothing of ours may be looked up on a hub in there: it is handed local files.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        try:
            self._process = subprocess.Popen(
                [*command, str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=environment,
                bufsize=0,
            )
        except OSError as error:
            raise PackageFailed(f"{label}: cannot start {command[0]}: {error.strerror}") from error
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        # Also when this object is forgotten, or the interpreter ends.
        self._end = weakref.finalize(self, _end, self._process, self._stderr, os.getpid())

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, header: dict[str, Any], body: bytes, seconds: float, remedy: str) -> tuple[dict[str, Any], bytes]:
        """The answer's header and bytes. `remedy` ends the message of an error.

        Raises:
            PackageFailed: see there. The process has been ended.
        """
        text = json.dumps(header).encode()
        deadline = time.monotonic() + seconds
        try:
            self._write(FRAME.pack(MAGIC, len(text), len(body)) + text, deadline)
            self._write(body, deadline)
            magic, header_size, body_size = FRAME.unpack(self._read(FRAME.size, deadline))
            if magic != MAGIC or header_size > HEADER_LIMIT or body_size > HEADER_LIMIT:
                raise _Fault("wrote something that is no answer to its standard output")
            answer = json.loads(self._read(header_size, deadline))
            if "error" in answer:
                raise _Fault(f"raised {answer['error']}")
            return answer, self._read(body_size, deadline)
        except TimeoutError:
            fault = f"did not answer within {seconds:g} s"
        except (_Fault, json.JSONDecodeError) as error:
            fault = str(error)
        except (EOFError, BrokenPipeError):
            fault = self._how_it_ended()
        except BaseException:
            self.close()  # an answer may be under way: the next question would get it
            raise
        message = f"{self.label}: its process {fault}; {remedy}{self._last_words()}"
        self.close()
        raise PackageFailed(message)

    def close(self) -> None:
        """End the process and wait for that. Once more does nothing."""
        self._end()

    def _write(self, content: bytes, deadline: float) -> None:
        rest = memoryview(content)
        while rest:
            _wait(self._in, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(self._in, rest[:PIECE]) :]
            except BlockingIOError:
                continue

    def _read(self, size: int, deadline: float) -> bytes:
        pieces = []
        while size:
            _wait(self._out, select.POLLIN, deadline)
            try:
                piece = os.read(self._out, min(size, PIECE))
            except BlockingIOError:
                continue
            if not piece:
                raise EOFError
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return "closed its pipes"
        if status == -9:
            return "was killed (signal 9: out of memory?)"
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"

    def _last_words(self) -> str:
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - 10_000))
        lines = [line for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        return "; its last words: " + " | ".join(line.strip() for line in lines[-LINES_SHOWN:]) if lines else ""


class _Fault(Exception):
    pass


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1000):
        raise TimeoutError


def _end(process: subprocess.Popen[bytes], stderr: IO[bytes], owner: int) -> None:
    if os.getpid() == owner:  # a fork of the owner has no say
        assert process.stdin and process.stdout
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # not even SIGKILL ends one that waits for a disk
                process.wait(SECONDS_TO_END)
    stderr.close()
