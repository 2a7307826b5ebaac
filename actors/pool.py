"""Own dispatch over a pool of actors: at most n calls in flight each, every call under a deadline, the dead replaced.

A chunk of work is a pure function of its arguments, so what a dead or hung actor had in hand simply goes to another
one. Idle actors are asked now and then whether they live. (`ray.util.ActorPool` strands its work when an actor dies.)
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass
class _Order:
    """Work that waits. Its arguments are found when an actor is free for it, so that they are the newest."""

    key: Any
    method: str
    arguments: Callable[[], tuple[Any, ...]]


@dataclass
class _Call:
    order: _Order
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
        self.on_fault: Callable[[Exception], None] = lambda error: None  # told of every failure, survived or not
        # Asked when a chunk has cost all its attempts: whether it is taken care of, else the run ends.
        self.on_hopeless: Callable[[Any, Exception], bool] = lambda key, error: False
        self.inputs_lost: list[Any] = []  # keys whose arguments are gone: the owner must make them again
        self._spawn, self._say = spawn, say
        self._queue: deque[_Order] = deque()
        self._calls: dict[ray.ObjectRef, _Call] = {}
        self._joining: dict[ray.ObjectRef, tuple[Any, float]] = {}
        self._pings: dict[ray.ObjectRef, tuple[Any, float]] = {}
        self._asked: dict[int, float] = {}  # when each actor was last asked whether it lives
        self._attempts: Counter[Any] = Counter()
        self._failed_starts = 0

    def submit(self, key: Any, method: str, arguments: Callable[[], tuple[Any, ...]], first: bool = False) -> None:
        """Queue a remote method with several returns, the last of them small. `first`: before all that waits."""
        order = _Order(key, method, arguments)
        if first:
            self._queue.appendleft(order)
        else:
            self._queue.append(order)

    @property
    def waiting_on(self) -> list[ray.ObjectRef]:
        return [*self._calls, *(self._joining if self._queue else ())]

    @property
    def waiting(self) -> int:
        """Chunks that no actor has yet."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Chunks that actors have."""
        return len(self._calls)

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
            key = call.order.key
            try:
                summary = get(ref, self.limits.chunk_seconds, f"{self.role} {_name(key)}", "run.chunk_seconds")
            except ActorDied as error:
                self._discard(call.actor, error)
                continue
            except ObjectLost as error:
                self.on_fault(error)
                self._say(f"{error}: will be made again")
                self.inputs_lost.append(key)
            except Exception as error:
                self.on_fault(error)
                raise
            else:
                finished.append((key, call.outputs[:-1], summary))
                self._attempts.pop(key, None)
            del self._calls[ref]
            for other in self._calls.values():  # what queued behind it can run now
                if other.actor is call.actor:
                    other.started = time.monotonic()
        self._check_deadlines()
        self._check_joining()
        self._check_idle()
        while self._queue and (actor := self._least_busy()) is not None:
            order = self._queue.popleft()
            outputs = getattr(actor, order.method).remote(*order.arguments())
            self._calls[outputs[-1]] = _Call(order, actor, outputs, time.monotonic())
        return finished

    def resize(self, wanted: int) -> None:
        """As many actors as the cluster has room for now: more, or fewer, the idle going first. A chunk that one of
        those has in hand goes to another."""
        self._failed_starts = 0
        self._sweep()
        for _ in range(wanted - len(self.actors) - len(self._joining)):
            self._start_another()
        for ref in list(self._joining)[max(0, wanted - len(self.actors)) :]:
            actor, _ = self._joining.pop(ref)
            ray.kill(actor)
        at_work = {id(call.actor) for call in self._calls.values()}
        for actor in sorted(self.actors, key=lambda actor: id(actor) in at_work)[: max(0, len(self.actors) - wanted)]:
            self._take_back(actor)
            self._remove(actor)

    def _discard(self, actor: Any, error: Exception) -> None:
        """Drop an actor that failed at its work, queue what it had in hand anew, and start another. What it had
        finished before is kept. The call that it was at has cost an attempt."""
        mine = [call for call in self._calls.values() if call.actor is actor]
        answered = done([call.outputs[-1] for call in mine])
        lost = [call for call in mine if call.outputs[-1] not in answered or self._died(call)]
        self.on_fault(error)
        self._say(f"{error}: replacing the actor")
        self._replace(actor)
        for call in lost:
            del self._calls[call.outputs[-1]]
            self.on_lost(call.order.key)
        if lost:
            key = lost[0].order.key
            self._attempts[key] += 1
            if self._attempts[key] >= self.limits.attempts:
                if not self.on_hopeless(key, error):
                    raise type(error)(f"{error} (tried {self._attempts[key]} times, run.chunk_attempts)") from error
                del self._attempts[key]  # what is done about it begins anew
                lost = lost[1:]
        self._queue.extendleft(call.order for call in reversed(lost))
        if isinstance(error, ActorDied):
            self._sweep()

    def _died(self, call: _Call) -> bool:
        """Whether an answered call says no more than that its actor is gone."""
        try:
            get(call.outputs[-1], self.limits.chunk_seconds, self.role, "run.chunk_seconds")
        except ActorDied:
            return True
        except Exception:  # the work's own failure: raised when its turn comes
            return False
        return False

    def _take_back(self, actor: Any) -> None:
        """What an actor has in hand, at no attempt's cost."""
        mine = [call for call in self._calls.values() if call.actor is actor]
        for call in mine:
            del self._calls[call.outputs[-1]]
            self.on_lost(call.order.key)
        self._queue.extendleft(call.order for call in reversed(mine))

    def _replace(self, actor: Any) -> None:
        self._remove(actor)
        self._start_another()

    def _remove(self, actor: Any) -> None:
        """For good: killed even if it only cannot be reached, lest it keep its share of the machine."""
        self.actors.remove(actor)
        self._pings = {ref: ping for ref, ping in self._pings.items() if ping[0] is not actor}
        self._asked.pop(id(actor), None)
        ray.kill(actor)

    def _sweep(self) -> None:
        """Find the idle that died at the same time, of a node say, before a chunk is given to one after the other."""
        self._asked.clear()
        self._check_idle()
        done(list(self._pings), SWEEP_SECONDS)
        self._check_idle()

    def _check_idle(self) -> None:
        """Ask idle actors whether they live; replace those that do not, or do not answer, at no chunk's cost."""
        for ref in done(list(self._pings)):
            if ref not in self._pings:
                continue
            actor, _ = self._pings.pop(ref)
            try:
                get(ref, PATIENCE, f"an idle actor for {self.role}", "run.chunk_seconds")
            except ActorDied as error:
                if not any(call.actor is actor for call in self._calls.values()):  # else its calls say so too
                    self.on_fault(error)
                    self._say(f"{error}: replacing the actor")
                    self._replace(actor)
        now, limit = time.monotonic(), self.limits.chunk_seconds
        for actor, since in list(self._pings.values()):
            if now - since > silence(limit) and actor in self.actors:
                what = f"an idle actor for {self.role} did not answer in run.chunk_seconds={limit:g} s"
                self.on_fault(DeadlineExceeded(what))
                self._say(f"{what}: replacing it")
                self._take_back(actor)
                self._replace(actor)
        busy = {id(call.actor) for call in self._calls.values()} | {id(actor) for actor, _ in self._pings.values()}
        for actor in self.actors:
            if id(actor) not in busy and now - self._asked.get(id(actor), -PING_SECONDS) >= PING_SECONDS:
                self._asked[id(actor)] = now
                self._pings[actor.ready.remote()] = (actor, now)

    def _start_another(self) -> None:
        actor = self._spawn()
        self._joining[actor.ready.remote()] = (actor, time.monotonic())

    def _check_deadlines(self) -> None:
        limit = self.limits.chunk_seconds
        for call in self._at_work():
            if time.monotonic() - call.started > limit and call.actor in self.actors:
                what = f"{self.role} {_name(call.order.key)} took longer than run.chunk_seconds={limit:g} s"
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
        self.on_fault(error)
        self._failed_starts += 1
        if self._failed_starts < self.limits.attempts:
            self._say(f"{error}: trying another")
            self._start_another()
        elif not self.actors and not self._joining:
            raise error
        else:
            self._say(f"{error}: going on with {len(self.actors)}")

    def _at_work(self) -> list[_Call]:
        """The call that each actor is at: the first one it was given."""
        first: dict[int, _Call] = {}
        for call in self._calls.values():
            first.setdefault(id(call.actor), call)
        return list(first.values())

    def _least_busy(self) -> Any | None:
        """An actor with room. One that leaves a question unanswered is the last to be given work."""
        now = time.monotonic()
        silent = {id(actor) for actor, since in self._pings.values() if now - since > PATIENCE}
        loads = Counter(id(call.actor) for call in self._calls.values())
        free = [actor for actor in self.actors if loads[id(actor)] < self.in_flight]
        answering = [actor for actor in free if id(actor) not in silent]
        if not answering and len(silent) < len(self.actors):
            return None  # those that answer have their hands full, but will be free
        return min(answering or free, key=lambda actor: loads[id(actor)], default=None)


def silence(limit: float) -> float:
    """How long a question to an idle actor may stay open under a deadline of `limit` seconds: it was asked up to
    PING_SECONDS after the actor fell silent, and the deadline is for that."""
    return limit - min(PING_SECONDS, limit / 2)


def _name(key: Any) -> str:
    """Of the chunk in messages."""
    if not isinstance(key, tuple):
        return str(key)
    purpose, epoch, index = key[:3]
    where = f"epoch {epoch}" if purpose == "train" else "the evaluation set"
    return f"chunk {index} of {where}" + "".join(f", row {row}" for row in key[3:4])
