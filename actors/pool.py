"""Own dispatch over a pool of actors: at most n calls in flight each, every call under a deadline, the dead replaced.

A chunk of work is a pure function of its arguments, so what a dead or hung actor had in hand simply goes to another
one. Idle actors are asked now and then whether they live. (`ray.util.ActorPool` strands its work when an actor dies.)
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import ray

from cluster.waits import ActorDied, DeadlineExceeded, ObjectLost, done, get

PING_SECONDS = 0.5  # between two questions to an idle actor
SWEEP_SECONDS = 0.5  # for the idle to answer when one has died: others may have gone with it
PATIENCE = 2.0  # an idle actor that has not answered for so long gets no work while others do


@dataclass(frozen=True)
class Limits:
    """Deadlines of a pool, and how often a chunk may be tried."""

    chunk_seconds: float  # one call, from when its actor is free for it; an idle actor's answer
    ready_seconds: float  # a replacement to be up
    attempts: int  # actors a chunk may cost


@dataclass(frozen=True)
class Listener:
    """Who hears of a pool's faults."""

    say: Callable[[str], None]  # a line for each fault that is survived
    lost: Callable[[Any], None] = lambda key: None  # every call that will be made again
    failed: Callable[[Exception], None] = lambda error: None  # every failure, survived or not


@dataclass
class _Call:
    """Work that waits or that an actor has. Its arguments are found when an actor is free for it, so that they are the
    newest."""

    key: Any
    method: str
    arguments: Callable[[], tuple[Any, ...]]
    remedy: str
    outputs: list[ray.ObjectRef] = field(default_factory=list)  # the last one is the small summary that is waited on


@dataclass(eq=False)
class _Member:
    """An actor that is up."""

    actor: Any
    calls: list[_Call] = field(default_factory=list)  # in the order that it does them
    since: float = 0.0  # when the first of them began
    ping: ray.ObjectRef | None = None  # the answer of an idle actor that was asked whether it lives
    asked: float = -math.inf


class Pool:
    """Feeds queued work to the least busy actor. Not a thread: the owner drives it with `pump`."""

    def __init__(
        self, role: str, actors: list[Any], spawn: Callable[[], Any], limits: Limits, listener: Listener,
        in_flight: int = 2,
    ) -> None:  # fmt: skip
        """`actors` are up; `spawn` starts another one, which has a `ready` method. `role` is for messages."""
        self.role, self.limits, self.listener, self.in_flight = role, limits, listener, in_flight
        self.inputs_lost: list[Any] = []  # keys whose arguments are gone: the owner must make them again
        self._spawn = spawn
        self._members = [_Member(actor) for actor in actors]
        self._queue: deque[_Call] = deque()
        self._finished: list[tuple[Any, list[ray.ObjectRef], Any]] = []
        self._joining: dict[ray.ObjectRef, tuple[Any, float]] = {}
        self._attempts: Counter[Any] = Counter()
        self._failed_starts = 0

    def submit(
        self, key: Any, method: str, arguments: Callable[[], tuple[Any, ...]], remedy: str = "", first: bool = False
    ) -> None:
        """Queue a remote method with several returns, the last of them small. `first`: before all that waits. `remedy`
        ends the message should the work cost all its attempts."""
        call = _Call(key, method, arguments, remedy)
        if first:
            self._queue.appendleft(call)
        else:
            self._queue.append(call)

    @property
    def actors(self) -> list[Any]:
        """Those that are up."""
        return [member.actor for member in self._members]

    @property
    def waiting_on(self) -> list[ray.ObjectRef]:
        calls = [call.outputs[-1] for member in self._members for call in member.calls]
        return [*calls, *(self._joining if self._queue else ())]

    @property
    def waiting(self) -> int:
        """Chunks that no actor has yet."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Chunks that actors have."""
        return sum(len(member.calls) for member in self._members)

    @property
    def busy(self) -> bool:
        return bool(self._queue or self.running)

    def pump(self) -> list[tuple[Any, list[ray.ObjectRef], Any]]:
        """Start what there is room for; return (key, outputs, summary) of every finished call, without blocking.

        Raises:
            ActorDied, DeadlineExceeded: a chunk cost `attempts` actors, or no actor is left and none can be started.
            Exception: what the remote code raised; such work is never tried again.
        """
        answered = set(done([call.outputs[-1] for member in self._members for call in member.calls]))
        for member in list(self._members):
            try:
                self._take_in(member, answered)
            except ActorDied as error:
                self._discard(member, error)
        self._check_deadlines()
        self._check_joining()
        self._check_idle()
        while self._queue and (free := self._least_busy()) is not None:
            call = self._queue.popleft()
            call.outputs = getattr(free.actor, call.method).remote(*call.arguments())
            free.since = free.since if free.calls else time.monotonic()
            free.calls.append(call)
        finished, self._finished = self._finished, []
        return finished

    def resize(self, wanted: int) -> None:
        """As many actors as the cluster has room for now: more, or fewer, the idle going first. A chunk that one of
        those has in hand goes to another."""
        self._failed_starts = 0
        self._sweep()
        for _ in range(wanted - len(self._members) - len(self._joining)):
            self._start_another()
        for ref in list(self._joining)[max(0, wanted - len(self._members)) :]:
            actor, _ = self._joining.pop(ref)
            ray.kill(actor)
        idle_first = sorted(self._members, key=lambda member: bool(member.calls))
        for member in idle_first[: max(0, len(self._members) - wanted)]:
            self._take_back(member)
            self._remove(member)

    def _take_in(self, member: _Member, answered: Collection[ray.ObjectRef]) -> None:
        """What an actor has finished.

        Raises:
            ActorDied: it did not survive its work.
            Exception: what its work raised.
        """
        for call in [call for call in member.calls if call.outputs[-1] in answered]:
            try:
                summary = get(
                    call.outputs[-1], self.limits.chunk_seconds, f"{self.role} {call.key}", "run.chunk_seconds"
                )
            except ActorDied:
                raise
            except ObjectLost as error:
                self._fault(error, "will be made again")
                self.inputs_lost.append(call.key)
            except Exception as error:
                self.listener.failed(error)
                raise
            else:
                self._finished.append((call.key, call.outputs[:-1], summary))
                self._attempts.pop(call.key, None)
            member.calls.remove(call)
            member.since = time.monotonic()  # what queued behind it can run now

    def _discard(self, member: _Member, error: Exception) -> None:
        """Drop an actor that failed at its work, queue what it had in hand anew, and start another. What it had
        finished before is kept. The call that it was at has cost an attempt."""
        self._fault(error, "replacing the actor")
        self._replace(member)
        for ref in done([call.outputs[-1] for call in member.calls]):
            with contextlib.suppress(ActorDied):  # that answer says no more than that the actor is gone
                self._take_in(member, [ref])
        lost = member.calls[:1]
        self._take_back(member)
        for call in lost:
            self._attempts[call.key] += 1
            if (tried := self._attempts[call.key]) >= self.limits.attempts:
                remedy = f"; {call.remedy}" if call.remedy else ""
                raise type(error)(f"{error} (tried {tried} times, run.chunk_attempts){remedy}") from error
        if isinstance(error, ActorDied):
            self._sweep()

    def _take_back(self, member: _Member) -> None:
        """What an actor has in hand goes to others."""
        for call in member.calls:
            self.listener.lost(call.key)
        self._queue.extendleft(reversed(member.calls))
        member.calls = []

    def _replace(self, member: _Member) -> None:
        self._remove(member)
        self._start_another()

    def _remove(self, member: _Member) -> None:
        """For good: killed even if it only cannot be reached, lest it keep its share of the machine."""
        self._members.remove(member)
        ray.kill(member.actor)

    def _sweep(self) -> None:
        """Find the idle that died at the same time, of a node say, before a chunk is given to one after the other."""
        for member in self._members:
            if member.ping is None:
                member.asked = -math.inf
        self._check_idle()
        done([member.ping for member in self._members if member.ping is not None], SWEEP_SECONDS)
        self._check_idle()

    def _check_idle(self) -> None:
        """Ask idle actors whether they live; replace those that do not, or do not answer, at no chunk's cost."""
        answered = set(done([member.ping for member in self._members if member.ping is not None]))
        now, limit = time.monotonic(), self.limits.chunk_seconds
        for member in list(self._members):
            if member.ping in answered:
                ping, member.ping = member.ping, None
                try:
                    get(ping, PATIENCE, f"an idle actor for {self.role}", "run.chunk_seconds")
                except ActorDied as error:
                    if not member.calls:  # else its calls say so too
                        self._fault(error, "replacing the actor")
                        self._replace(member)
            elif member.ping is not None and now - member.asked > silence(limit):
                what = f"an idle actor for {self.role} did not answer in run.chunk_seconds={limit:g} s"
                self._fault(DeadlineExceeded(what), "replacing it")
                self._take_back(member)
                self._replace(member)
        for member in self._members:
            if not member.calls and member.ping is None and now - member.asked >= PING_SECONDS:
                member.asked, member.ping = now, member.actor.ready.remote()

    def _start_another(self) -> None:
        actor = self._spawn()
        self._joining[actor.ready.remote()] = (actor, time.monotonic())

    def _check_deadlines(self) -> None:
        """Each actor's is for the call that it is at: the first one it was given."""
        limit = self.limits.chunk_seconds
        for member in list(self._members):
            if member.calls and time.monotonic() - member.since > limit:
                what = f"{self.role} {member.calls[0].key} took longer than run.chunk_seconds={limit:g} s"
                self._discard(member, DeadlineExceeded(what))

    def _check_joining(self) -> None:
        limit = self.limits.ready_seconds
        for ref in done(list(self._joining)):
            actor, _ = self._joining.pop(ref)
            try:
                get(ref, limit, f"a replacement for {self.role}", "run.ready_seconds")
            except ActorDied as error:
                self._not_started(error)
            else:
                self._members.append(_Member(actor))
                self._failed_starts = 0
        for ref, (actor, since) in list(self._joining.items()):
            if time.monotonic() - since > limit:
                del self._joining[ref]
                ray.kill(actor)
                self._not_started(DeadlineExceeded(f"a replacement for {self.role} was not up in {limit:g} s"))

    def _not_started(self, error: Exception) -> None:
        self._failed_starts += 1
        if self._failed_starts < self.limits.attempts:
            self._fault(error, "trying another")
            self._start_another()
        elif self._members or self._joining:
            self._fault(error, f"going on with {len(self._members)}")
        else:
            self.listener.failed(error)
            raise error

    def _fault(self, error: Exception, way_on: str) -> None:
        """One that is survived."""
        self.listener.failed(error)
        self.listener.say(f"{error}: {way_on}")

    def _least_busy(self) -> _Member | None:
        """An actor with room. One that leaves a question unanswered is the last to be given work."""
        now = time.monotonic()
        silent = [member for member in self._members if member.ping is not None and now - member.asked > PATIENCE]
        free = [member for member in self._members if len(member.calls) < self.in_flight]
        answering = [member for member in free if member not in silent]
        if not answering and len(silent) < len(self._members):
            return None  # those that answer have their hands full, but will be free
        return min(answering or free, key=lambda member: len(member.calls), default=None)


def silence(limit: float) -> float:
    """How long a question to an idle actor may stay open under a deadline of `limit` seconds: it was asked up to
    PING_SECONDS after the actor fell silent, and the deadline is for that."""
    return limit - min(PING_SECONDS, limit / 2)
