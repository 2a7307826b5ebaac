"""How commands end: a line on stderr for each fault, and an exit status."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from cluster import signals
from diffusion.failures import RunFailure
from learner.config import ConfigError
from records.passwords import without_passwords
from records.words import MOST, printable, short


def complain(verb: str, text: str, program: str = "learner") -> None:
    """One line on stderr, whatever `text` holds; URLs without their passwords."""
    line = short(" ".join(without_passwords(text).split()), 2 * MOST)
    tell(f"{program}.{verb}: {printable(line)}", sys.stderr)


def warner(verb: str) -> Callable[[str], None]:
    """Says each warning once."""
    return functools.cache(lambda text: complain(verb, f"warning: {text}"))


def require_writable(flag: str, path: Path | None, folder: bool = False) -> None:
    """Before the work whose result goes there: raises a ValueError, which names the flag, where `path`, a file or a
    `folder`, cannot be written."""
    if path is None:
        return
    target = path.absolute()
    there = next(place for place in (target, *target.parents) if os.path.exists(place))
    fault = ""
    if there.is_dir() != (folder or there != target):
        fault = f"{there} is a {'folder' if there.is_dir() else 'file'}"
    elif not os.access(there, os.W_OK):
        fault = f"{there} cannot be written"
    if fault:
        raise ValueError(f"{flag}: {path}: {fault}")


def tell(text: str, stream: TextIO) -> None:
    """Print a line; where nobody reads them any more, the work goes on all the same."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        signals.hush(stream)


def attempt(verb: str, work: Callable[[], object], run: str = "") -> int:
    """Exit status of `work`: 0; 2 if input is bad, or the files of `run`, from which it reads; 1 if it fails."""
    place = f"{run}: " if run else ""
    try:
        work()
    except BrokenPipeError:  # of what it prints: learner/__main__.py knows
        raise
    except (OSError, ValueError) as error:
        for line in str(error).splitlines() if isinstance(error, ConfigError) else [str(error)]:
            complain(verb, place + line)
        return 2
    except RunFailure as error:
        complain(verb, f"{place}{error}")
        return 1
    return 0
