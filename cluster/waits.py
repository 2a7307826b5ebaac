"""Waiting on Ray with a deadline, always; failures told apart by role."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError


class DeadlineExceeded(TimeoutError):
    """Something did not answer in time; the message says what, and which setting is the limit."""


class ActorDied(RuntimeError):
    """An actor's process, or an object it held, was gone when it was needed."""


def get(refs: Any, seconds: float, what: str, setting: str) -> Any:
    """ray.get with a deadline.

    Raises:
        DeadlineExceeded: nothing within `seconds`.
        ActorDied: the actor that owes the answer is gone.
        Exception: whatever the remote code raised, as its own type.
    """
    try:
        return ray.get(refs, timeout=seconds)
    except GetTimeoutError:
        limit = setting if "=" in setting else f"{setting}={seconds:g}"
        raise DeadlineExceeded(f"{what} took longer than {limit} s") from None
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise ActorDied(f"{what}: {str(error).splitlines()[0]}") from error


def wait_any(refs: Sequence[ray.ObjectRef], seconds: float) -> list[ray.ObjectRef]:
    """Those of `refs` that are done, after at most `seconds`; at least one unless time ran out."""
    done, _ = ray.wait(list(refs), num_returns=1, timeout=max(0.0, seconds))
    return done
