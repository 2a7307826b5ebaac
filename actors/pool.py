"""Own dispatch over a pool of actors: at most n calls at once each and one behind, under deadlines, the dead replaced.
Work is a pure function of its arguments, so what a dead or hung actor had in hand simply goes to another one. Idle
actors are asked now and then whether they live. (`ray.util.ActorPool` strands its work when an actor dies.)"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ray

from cluster.waits import ActorDied, ObjectLost, done, get
from diffusion.failures import DeadlineExceeded
from learner.config import Config

PING_SECONDS = 0.5  # between two questions to an idle actor
PATIENCE = 2.0  # an idle actor that has not answered for so long gets no work while others do


class Probes:
    """Questions to actors whether they are up, each under a deadline."""

    def __init__(self, what: str, setting: str, limit: float, idle: bool = True) -> None:
        """`limit` in seconds; an `idle` actor may have fallen silent up to PING_SECONDS before it was asked."""
        self.what, self.setting, self.limit = what, f"{setting}={limit:g}", limit
        self.open: dict[Any, ray.ObjectRef] = {}  # by actor: the answer that is awaited
        self._seconds = limit - min(PING_SECONDS, limit / 2) if idle else limit
        self._asked: dict[Any, float] = {}

    def ask(self, actors: Iterable[Any], every: float = 0.0) -> None:
        """Those that owe no answer, and were not asked for `every` seconds."""
        now = time.monotonic()
        for actor in actors:
            if actor not in self.open and now - self._asked.get(actor, -math.inf) >= every:
                self.open[actor], self._asked[actor] = actor.ready.remote(), now

    def answers(self) -> Iterator[tuple[Any, Exception | None]]:
        """Actors that have answered by now and, with the error, those that are dead or did not answer in time."""
        answered = set(done(list(self.open.values())))
        for actor, ref in list(self.open.items()):
            error: Exception | None = None
            if ref in answered:
                try:
                    get(ref, self.limit, self.what, self.setting)
                except ActorDied as died:
                    error = died
            elif self.silence(actor) > self._seconds:
                error = DeadlineExceeded(f"{self.what} did not answer in {self.setting} s")
            else:
                continue
            del self.open[actor]
            yield actor, error

    def silence(self, actor: Any) -> float:
        """Seconds that the actor has owed an answer."""
        return time.monotonic() - self._asked[actor] if actor in self.open else 0.0


@dataclass
class _Call:
    key: Any
    outputs: list[ray.ObjectRef]  # the last one is the small summary that is waited on
    since: float  # when its actor was free for it


class Pool:
    """Feeds queued keys of work to the least busy actor. Not a thread: the owner drives it with `pump`."""

    def __init__(
        self, doing: str, count: int, spawn: Callable[[], Any], call: Callable[[Any, Any], list[ray.ObjectRef]],
        config: Config, failed: Callable[[Exception, str], None], lost: Callable[[Any], None],
        remedy: Callable[[Any], str], at_once: int = 1,
    ) -> None:  # fmt: skip
        """Spawns `count` actors; they have a method `ready`, and are to be up before `pump`. `call(actor, key)` has
        one do a key's work, with several returns, the last of them small. `failed` hears of every failure survived and
        the way on; `lost` of every call to be made again; `remedy` is for a key that cost all attempts.
        An actor does `at_once` calls at the same time, and is given one more, so that it need not wait for it."""
        self.doing, self.run, limit = doing, config.run, config.run.chunk_seconds
        self._most = at_once + 1
        self.inputs_lost: list[Any] = []  # keys whose arguments are gone: the owner must make them again
        self._spawn, self._call, self._failed, self._lost, self._remedy = spawn, call, failed, lost, remedy
        self.calls: dict[Any, list[_Call]] = {spawn(): [] for _ in range(count)}  # by actor that is up, in their order
        self._idle = Probes(f"an idle actor for {doing}", "run.chunk_seconds", limit)
        self._joining = Probes(f"a replacement for {doing}", "run.ready_seconds", self.run.ready_seconds, idle=False)
        self._queue: deque[Any] = deque()
        self._attempts: Counter[Any] = Counter()
        self._failed_starts = 0

    def submit(self, key: Any, first: bool = False) -> None:
        """`first`: before all that waits."""
        (self._queue.appendleft if first else self._queue.append)(key)

    @property
    def waiting_on(self) -> list[ray.ObjectRef]:
        return [*self._summaries(), *(self._joining.open.values() if self._queue else ())]

    def load(self) -> tuple[int, int]:
        """Keys that no actor has yet, and those that actors have."""
        return len(self._queue), len(self._summaries())

    def pump(self) -> list[tuple[Any, list[ray.ObjectRef], Any]]:
        """Start what there is room for; return (key, outputs, summary) of every finished call, without blocking. Raises
        ActorDied or DeadlineExceeded if a key cost run.chunk_attempts actors, or no actor is left and none starts, and
        what the remote code raised; such work is never tried again."""
        finished: list[tuple[Any, list[ray.ObjectRef], Any]] = []
        answered, limit = set(done(self._summaries())), self.run.chunk_seconds
        for actor in list(self.calls):
            calls = self.calls.get(actor, [])
            error: Exception | None = self._take_in(calls, answered, finished)
            if calls and error is None and time.monotonic() - calls[0].since > limit:
                error = DeadlineExceeded(f"{self.doing} {calls[0].key} took longer than run.chunk_seconds={limit:g} s")
            if error is not None:
                self._discard(actor, error)
        self._check_joining()
        self._check_idle(PING_SECONDS)
        while self._queue and (actor := self._least_busy()) is not None:
            key = self._queue.popleft()
            self.calls[actor].append(_Call(key, self._call(actor, key), time.monotonic()))
        return finished

    def resize(self, wanted: int) -> None:
        """As many actors as there is room for now: more, or fewer, the idle going first."""
        self._failed_starts = 0
        self._sweep()
        for _ in range(wanted - len(self.calls) - len(self._joining.open)):
            self._joining.ask([self._spawn()])
        for actor in list(self._joining.open)[max(0, wanted - len(self.calls)) :]:
            del self._joining.open[actor]
            ray.kill(actor)
        idle_first = sorted(self.calls, key=lambda actor: bool(self.calls[actor]))
        for actor in idle_first[: max(0, len(self.calls) - wanted)]:
            self._remove(actor)

    def _summaries(self) -> list[ray.ObjectRef]:
        return [call.outputs[-1] for calls in self.calls.values() for call in calls]

    def _take_in(self, calls: list[_Call], answered: set[ray.ObjectRef], finished: list[Any]) -> ActorDied | None:
        """What an actor has finished, also if it died after that."""
        death = None
        for call in [call for call in calls if call.outputs[-1] in answered]:
            what = f"{self.doing} {call.key}"
            try:
                summary = get(call.outputs[-1], self.run.chunk_seconds, what, "run.chunk_seconds")
            except ActorDied as error:
                death = death or error
                continue
            except ObjectLost as error:
                self._failed(error, "will be made again")
                self.inputs_lost.append(call.key)
            else:
                finished.append((call.key, call.outputs[:-1], summary))
                self._attempts.pop(call.key, None)
            first = calls[0] is call
            calls.remove(call)
            if first and calls:
                calls[0].since = time.monotonic()
        return death

    def _discard(self, actor: Any, error: Exception) -> None:
        """Replace an actor that failed at its work: the key that it was at has cost an attempt."""
        key = self.calls[actor][0].key
        self._replace(actor, error)
        self._attempts[key] += 1
        if (tried := self._attempts[key]) >= self.run.chunk_attempts:
            text = f"{error} (tried {tried} times, run.chunk_attempts); {self._remedy(key)}"
            raise type(error)(text) from error
        if isinstance(error, ActorDied):
            self._sweep()

    def _replace(self, actor: Any, error: Exception) -> None:
        self._failed(error, "replacing the actor")
        self._remove(actor)
        self._joining.ask([self._spawn()])

    def _remove(self, actor: Any) -> None:
        """Killed even if it only cannot be reached, lest it keep its share of the machine. Its work goes to others."""
        self._idle.open.pop(actor, None)
        ray.kill(actor)
        for call in reversed(self.calls.pop(actor)):
            self._lost(call.key)
            self._queue.appendleft(call.key)

    def _sweep(self) -> None:
        """Find the idle that died at the same time, of a node say, before a key is given to one after the other."""
        self._check_idle(0.0)
        done(list(self._idle.open.values()), PING_SECONDS)
        self._check_idle(PING_SECONDS)

    def _check_idle(self, every: float) -> None:
        """Replace idle actors that are dead or silent for too long, at no key's cost; ask those that are there."""
        for actor, error in self._idle.answers():
            busy = bool(self.calls[actor])
            if error is not None and not (busy and isinstance(error, ActorDied)):  # its calls say so too
                self._replace(actor, error)
        self._idle.ask((actor for actor, calls in self.calls.items() if not calls), every)

    def _check_joining(self) -> None:
        for actor, error in self._joining.answers():
            if error is None:
                self.calls[actor], self._failed_starts = [], 0
                continue
            ray.kill(actor)
            self._failed_starts += 1
            if self._failed_starts < self.run.chunk_attempts:
                self._failed(error, "trying another")
                self._joining.ask([self._spawn()])
            elif self.calls or self._joining.open:
                self._failed(error, f"going on with {len(self.calls)}")
            else:
                raise error

    def _least_busy(self) -> Any:
        """An actor with room, or None. One that leaves a question unanswered is the last to be given work."""
        silent = [actor for actor in self.calls if self._idle.silence(actor) > PATIENCE]
        free = [actor for actor, calls in self.calls.items() if len(calls) < self._most]
        answering = [actor for actor in free if actor not in silent]
        if not answering and len(silent) < len(self.calls):
            return None  # those that answer have their hands full, but will be free
        return min(answering or free, key=lambda actor: len(self.calls[actor]), default=None)
