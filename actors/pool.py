"""Own dispatch over a pool of actors: at most n calls in flight each, every call under a deadline, the dead replaced.

A chunk of work is a pure function of its arguments, so what a dead or hung actor had in hand simply goes to another
one. (`ray.util.ActorPool` strands its work when an actor dies.)
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from cluster.waits import ActorDied, DeadlineExceeded, ObjectLost, done, get

SWEEP_SECONDS = 2.0  # for idle actors to say that they live; the dead are found at once


@dataclass(frozen=True)
class Limits:
    """Deadlines of a pool, and how often a chunk may be tried."""

    chunk_seconds: float  # one call, from when its actor is free for it
    ready_seconds: float  # a replacement to be up
    attempts: int  # actors a chunk may cost


@dataclass
class _Call:
    key: Any
    method: str
    arguments: tuple[Any, ...]
    actor: Any
    outputs: list[ray.ObjectRef]  # the last one is the small summary that is waited on
    started: float


class Pool:
    """Feeds queued work to the least busy actor. Not a thread: the owner drives it with `pump`."""

    def __init__(
        self, role: str, actors: list[Any], spawn: Callable[[], Any], limits: Limits, say: Callable[[str], None],
        in_flight: int = 2,
    ) -> None:  # fmt: skip
        """`actors` are up; `spawn` starts another one, which has a `ready` method. `say` hears of each fault."""
        self.role, self.actors, self.limits, self.in_flight = role, actors, limits, in_flight
        self.on_lost: Callable[[Any], None] = lambda key: None  # told of every call that will be made again
        self.inputs_lost: list[Any] = []  # keys whose arguments are gone: the owner must make them again
        self._spawn, self._say = spawn, say
        self._queue: deque[tuple[Any, str, tuple[Any, ...]]] = deque()
        self._calls: dict[ray.ObjectRef, _Call] = {}
        self._joining: dict[ray.ObjectRef, tuple[Any, float]] = {}
        self._attempts: Counter[Any] = Counter()
        self._failed_starts = 0

    def begin(self) -> None:
        """A new round of work, with keys of its own. Actors that died meanwhile are replaced, at no chunk's cost."""
        self._attempts.clear()
        self._sweep()

    def submit(self, key: Any, method: str, *arguments: Any) -> None:
        """Queue a remote method with several returns, the last of them small."""
        self._queue.append((key, method, arguments))

    @property
    def waiting_on(self) -> list[ray.ObjectRef]:
        return [*self._calls, *(self._joining if self._queue else ())]

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._calls)

    def pump(self) -> list[tuple[Any, list[ray.ObjectRef], Any]]:
        """Start what there is room for; return (key, outputs, summary) of every finished call, without blocking.

        Raises:
            ActorDied, DeadlineExceeded: a chunk cost `attempts` actors, or no actor is left and none can be started.
            Exception: what the remote code raised; such work is never tried again.
        """
        finished = []
        for ref in done(list(self._calls)):
            if (call := self._calls.get(ref)) is None:
                continue  # its actor was discarded a moment ago
            try:
                summary = get(ref, self.limits.chunk_seconds, f"{self.role} {call.key}", "run.chunk_seconds")
            except ActorDied as error:
                self._discard(call.actor, error)
                continue
            except ObjectLost as error:
                self._say(f"{error}: will be made again")
                self.inputs_lost.append(call.key)
            else:
                finished.append((call.key, call.outputs[:-1], summary))
            del self._calls[ref]
            for other in self._calls.values():  # what queued behind it can run now
                if other.actor is call.actor:
                    other.started = time.monotonic()
        self._check_deadlines()
        self._check_joining()
        while self._queue and (actor := self._least_busy()) is not None:
            key, method, arguments = self._queue.popleft()
            outputs = getattr(actor, method).remote(*arguments)
            self._calls[outputs[-1]] = _Call(key, method, arguments, actor, outputs, time.monotonic())
        return finished

    def _discard(self, actor: Any, error: Exception) -> None:
        """Drop an actor that failed at its work, queue what it had in hand anew, and start another. What it had
        finished before is kept. The call that it was at has cost an attempt."""
        mine = [call for call in self._calls.values() if call.actor is actor]
        answered = done([call.outputs[-1] for call in mine])
        lost = [call for call in mine if call.outputs[-1] not in answered or self._died(call)]
        if lost:
            self._attempts[lost[0].key] += 1
            if self._attempts[lost[0].key] >= self.limits.attempts:
                raise type(error)(f"{error} (tried {self.limits.attempts} times, run.chunk_attempts)") from error
        self._replace(actor)
        for call in reversed(lost):
            del self._calls[call.outputs[-1]]
            self.on_lost(call.key)
            self._queue.appendleft((call.key, call.method, call.arguments))
        self._say(f"{error}: replacing the actor")
        self._sweep()

    def _died(self, call: _Call) -> bool:
        """Whether an answered call says no more than that its actor is gone."""
        try:
            get(call.outputs[-1], self.limits.chunk_seconds, f"{self.role} {call.key}", "run.chunk_seconds")
        except ActorDied:
            return True
        except Exception:  # the work's own failure: raised when its turn comes
            return False
        return False

    def _replace(self, actor: Any) -> None:
        """For good: killed even if it only cannot be reached, lest it keep its share of the machine."""
        self.actors.remove(actor)
        ray.kill(actor)
        self._start_another()

    def _sweep(self) -> None:
        """Find idle actors that are dead before work is given to them."""
        busy = {id(call.actor) for call in self._calls.values()}
        asked = {actor.ready.remote(): actor for actor in self.actors if id(actor) not in busy}
        for ref in done(list(asked), SWEEP_SECONDS):
            try:
                get(ref, SWEEP_SECONDS, f"an idle actor for {self.role}", "run.ready_seconds")
            except ActorDied as error:
                self._say(f"{error}: replacing the actor")
                self._replace(asked[ref])

    def _start_another(self) -> None:
        actor = self._spawn()
        self._joining[actor.ready.remote()] = (actor, time.monotonic())

    def _check_deadlines(self) -> None:
        limit = self.limits.chunk_seconds
        for call in self._running():
            if time.monotonic() - call.started > limit and call.actor in self.actors:
                what = f"{self.role} {call.key} took longer than run.chunk_seconds={limit:g} s"
                self._discard(call.actor, DeadlineExceeded(what))

    def _check_joining(self) -> None:
        for ref in done(list(self._joining)):
            actor, _ = self._joining.pop(ref)
            try:
                get(ref, self.limits.ready_seconds, f"a replacement for {self.role}", "run.ready_seconds")
            except ActorDied as error:
                self._not_started(error)
            else:
                self.actors.append(actor)
                self._failed_starts = 0
        for ref, (actor, since) in list(self._joining.items()):
            if time.monotonic() - since > self.limits.ready_seconds:
                del self._joining[ref]
                ray.kill(actor)
                limit = self.limits.ready_seconds
                self._not_started(DeadlineExceeded(f"a replacement for {self.role} was not up in {limit:g} s"))

    def _not_started(self, error: Exception) -> None:
        self._failed_starts += 1
        if self._failed_starts < self.limits.attempts:
            self._say(f"{error}: trying another")
            self._start_another()
        elif not self.actors and not self._joining:
            raise error
        else:
            self._say(f"{error}: going on with {len(self.actors)}")

    def _running(self) -> list[_Call]:
        """The call that each actor is at: the first one it was given."""
        first: dict[int, _Call] = {}
        for call in self._calls.values():
            first.setdefault(id(call.actor), call)
        return list(first.values())

    def _least_busy(self) -> Any | None:
        loads = [sum(call.actor is actor for call in self._calls.values()) for actor in self.actors]
        if not loads:
            return None
        best = min(range(len(loads)), key=loads.__getitem__)
        return self.actors[best] if loads[best] < self.in_flight else None
