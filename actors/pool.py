"""Own dispatch over a pool of actors: at most n calls in flight each, every call under a deadline.

(`ray.util.ActorPool` strands its work when an actor dies.)
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import ray

from cluster.waits import DeadlineExceeded, get, wait_any


@dataclass
class _Call:
    key: Any
    actor: Any
    outputs: list[ray.ObjectRef]  # the last one is the small summary that is waited on
    started: float


class Pool:
    """Feeds queued work to the least busy actor. Not a thread: the owner drives it with `pump`."""

    def __init__(self, role: str, actors: list[Any], seconds: float, in_flight: int = 2) -> None:
        """`seconds` is the deadline of one call, from when its actor is free for it."""
        self.role, self.actors, self.seconds, self.in_flight = role, actors, seconds, in_flight
        self._queue: deque[tuple[Any, str, tuple[Any, ...]]] = deque()
        self._calls: dict[ray.ObjectRef, _Call] = {}

    def submit(self, key: Any, method: str, *arguments: Any) -> None:
        """Queue a remote method with several returns, the last of them small."""
        self._queue.append((key, method, arguments))

    @property
    def waiting_on(self) -> list[ray.ObjectRef]:
        return list(self._calls)

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._calls)

    def pump(self) -> list[tuple[Any, list[ray.ObjectRef], Any]]:
        """Start what there is room for; return (key, outputs, summary) of every finished call, without blocking.

        Raises:
            DeadlineExceeded, ActorDied, or what the remote code raised.
        """
        finished = []
        for ref in wait_any(self.waiting_on, 0) if self._calls else []:
            call = self._calls.pop(ref)
            for other in self._calls.values():  # what queued behind it can run now
                if other.actor is call.actor:
                    other.started = time.monotonic()
            summary = get(ref, self.seconds, f"{self.role} on {call.key}", "run.chunk_seconds")
            finished.append((call.key, call.outputs[:-1], summary))
        for call in self._running():
            if time.monotonic() - call.started > self.seconds:
                raise DeadlineExceeded(
                    f"{self.role} on {call.key} took longer than run.chunk_seconds={self.seconds:g} s"
                )
        while self._queue and (actor := self._least_busy()) is not None:
            key, method, arguments = self._queue.popleft()
            outputs = getattr(actor, method).remote(*arguments)
            self._calls[outputs[-1]] = _Call(key, actor, outputs, time.monotonic())
        return finished

    def _running(self) -> list[_Call]:
        """The call that each actor is at: the first one it was given."""
        first: dict[int, _Call] = {}
        for call in self._calls.values():
            first.setdefault(id(call.actor), call)
        return list(first.values())

    def _least_busy(self) -> Any | None:
        loads = [sum(call.actor is actor for call in self._calls.values()) for actor in self.actors]
        best = min(range(len(loads)), key=loads.__getitem__)
        return self.actors[best] if loads[best] < self.in_flight else None
