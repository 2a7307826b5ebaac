"""Around a reward's code, which may be anybody's: what it raises is said with the lines of its author's files, and
torch's global settings are afterwards what they were. Imports no torch by itself."""

import contextlib
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffusion.failures import DeadlineExceeded, ServiceFailed

ROOT = Path(__file__).resolve().parents[1]
OTHERS = [  # whose lines are nobody's reward: ours on the way to it, Python's, what is installed
    *(ROOT / name for name in ("commands", "diffusion", "learner", "models", "rewards")),
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")),
]
LINES, CHARACTERS = 5, 2000  # that a message has at most
DEFECTS = AttributeError, ImportError, NameError, NotImplementedError, SyntaxError, TypeError


@contextlib.contextmanager
def named_failure(kind: type[Exception], text: str) -> Iterator[None]:
    """Whatever is raised in here, also an exit, becomes `kind`: `text`, then `in_words`. But for Ctrl-C, a deadline,
    which only gains the lines, and what is not the reward's fault: a lack of GPU memory, a service that fails."""
    import torch

    try:
        with _settings_kept():
            yield
    except (KeyboardInterrupt, torch.OutOfMemoryError, ServiceFailed):
        raise
    except DeadlineExceeded as error:
        raise DeadlineExceeded(f"{error}{_lines(error)}") from error
    except BaseException as error:
        raise kind(f"{text}: {in_words(error)}") from error


def is_defect(error: BaseException | None) -> bool:
    """Whether this is a fault of the code, which every picture meets, and not of the data."""
    return isinstance(error, DEFECTS)


def in_words(error: BaseException) -> str:
    """Type, message and the lines of its author's files; a message that cannot be made or is long is no trouble."""
    try:
        message = str(error)
    except Exception as another:
        message = f"(its message cannot be printed: {type(another).__name__})"
    message = message if len(message) <= CHARACTERS else f"{message[:CHARACTERS]} ..."
    return f"{type(error).__name__}{message and f': {message}'}{_lines(error)}"


def _lines(error: BaseException) -> str:
    frames = [at for at in traceback.extract_tb(error.__traceback__) if _is_own(at.filename)][-LINES:]
    lines = [f"{at.filename}:{at.lineno} in {at.name}: {at.line}" for at in frames]
    if isinstance(error, SyntaxError) and error.filename:  # no frame: it never ran
        lines.append(f"{error.filename}:{error.lineno}: {(error.text or '').strip()}")
    return f" (at {'; '.join(lines)})" if lines else ""


def _is_own(filename: str) -> bool:
    path = Path(filename).absolute()
    return not filename.startswith("<frozen ") and not any(path.is_relative_to(place) for place in OTHERS)


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """Those that results depend on, or whether there are any. Not the state of torch's global generator: nothing of
    ours draws from it, and a reward that does would draw the same again and again."""
    import torch

    settings: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_default_device, torch.set_default_device),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    )
    before = [get() for get, _ in settings]
    try:
        yield
    finally:
        for (get, put), value in zip(settings, before, strict=True):
            if get() != value:
                put(value)
