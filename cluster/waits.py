"""Waiting on Ray with a deadline, always; failures told apart: an actor's, the data's, the code's."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError, RayTaskError

from diffusion.failures import DeadlineExceeded, RunFailure


class ActorDied(RunFailure, RuntimeError):
    """An actor's process was gone when it was needed, or could not start."""


class ObjectLost(RunFailure, RuntimeError):
    """Something an actor had made, trajectories or clean predictions, was gone when it was needed."""


def get(refs: Any, seconds: float, what: str, setting: str) -> Any:
    """ray.get with a deadline. Raises DeadlineExceeded, ActorDied (the actor that owes the answer is gone), ObjectLost
    (what it needed for the answer is gone), or whatever the remote code raised, as its own type."""
    try:
        return ray.get(refs, timeout=seconds)
    except GetTimeoutError:
        limit = setting if "=" in setting else f"{setting}={seconds:g}"
        raise DeadlineExceeded(f"{what} took longer than {limit} s") from None
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, ObjectLostError):
            raise ObjectLost(f"{what}: {_reason(cause)}") from error
        if cause is not error:
            raise cause from error
        raise ActorDied(f"{what}: {_reason(error)}") from error


def put(value: Any, what: str) -> ray.ObjectRef:
    """ray.put. Raises ObjectLost if the object store has no room for it."""
    try:
        return ray.put(value)
    except RayError as error:
        raise ObjectLost(f"{what}: {_reason(error)}") from error


def done(refs: Sequence[ray.ObjectRef], seconds: float = 0.0, enough: int | None = None) -> list[ray.ObjectRef]:
    """Those of `refs` that are done; waits for `enough` of them (all) for at most `seconds`."""
    return ray.wait(list(refs), num_returns=enough or len(refs), timeout=max(0.0, seconds))[0] if refs else []


def _reason(error: RayError) -> str:
    """Ray's message in one line: of an actor that failed in its constructor, the last one, which names the fault."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "creation task" in lines[0] else lines[0]
