"""Waiting on Ray with a deadline, always; failures told apart: an actor's, the data's, the code's."""

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    RayError,
    RayTaskError,
)

from diffusion.failures import DeadlineExceeded, RunFailure


class ActorDied(RunFailure, RuntimeError):
    """An actor's process was gone when it was needed, or could not start."""


class ObjectLost(RunFailure, RuntimeError):
    """Something an actor had made, trajectories or clean predictions, was gone when it was needed."""


class StoreFull(RunFailure, RuntimeError):
    """Neither the object store of a node nor the disk that it spills to has room for what was made there."""


FULL = (
    "the object store is full, and so is the disk that it spills to; --plan says what an epoch needs of them: fewer "
    "train.trajectories, a smaller train.max_staleness or sampler.state_precision=float16 need less, and RAY_TMPDIR "
    "names a folder on another disk"
)


def get(refs: Any, seconds: float, what: str, setting: str) -> Any:
    """ray.get with a deadline. Raises DeadlineExceeded, ActorDied (the actor that owes the answer is gone), ObjectLost
    (what it needed for the answer is gone), StoreFull, or whatever the remote code raised, as its own type."""
    try:
        return ray.get(refs, timeout=seconds)
    except GetTimeoutError:
        limit = setting if "=" in setting else f"{setting}={seconds:g}"
        raise DeadlineExceeded(f"{what} took longer than {limit} s") from None
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
            raise StoreFull(f"{what}: {FULL}") from error
        if isinstance(cause, ObjectLostError):
            raise ObjectLost(f"{what}: {_reason(cause)}") from error
        if cause is not error:
            raise cause from error
        raise ActorDied(f"{what}: {_reason(error)}") from error


def put(value: Any, what: str) -> ray.ObjectRef:
    """ray.put. Raises StoreFull if there is no room for it, ObjectLost where the object store is gone."""
    try:
        return ray.put(value)
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise StoreFull(f"{what}: {FULL}") from error
    except RayError as error:
        raise ObjectLost(f"{what}: {_reason(error)}") from error


def done(refs: Sequence[ray.ObjectRef], seconds: float = 0.0, enough: int | None = None) -> list[ray.ObjectRef]:
    """Those of `refs` that are done; waits for `enough` of them (all) for at most `seconds`."""
    return ray.wait(list(refs), num_returns=enough or len(refs), timeout=max(0.0, seconds))[0] if refs else []


def _reason(error: RayError) -> str:
    """Ray's message in one line: of an actor that failed in its constructor, the last one, which names the fault."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "creation task" in lines[0] else lines[0]
