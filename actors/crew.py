"""What a run has on the cluster: samplers, reward actors, learner ranks and the room for those. All of it goes when the
run does."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from actors.metrics import Metrics
from actors.pool import Limits, Listener, Pool
from actors.shells import RewardActor, SamplerActor
from cluster.nodes import alive_nodes
from cluster.placement import Asked, Placement, Share, ready
from cluster.session import CLOSE_SECONDS
from learner.build import Parts
from learner.config import Config


@dataclass(frozen=True)
class Role:
    """Samplers, or reward actors."""

    name: str  # in an actor's name and on metrics
    plural: str
    doing: str
    share: Share  # what each has of the cluster
    spawn: Callable[[], Any]
    started: list[Any]  # at first

    def ask(self, method: str, *arguments: Any) -> Asked:
        calls = [getattr(actor, method).remote(*arguments) for actor in self.started]
        return Asked(self.plural, self.share, calls)


class Crew:
    """Starts actors and keeps count of them."""

    samplers: Role
    scorers: Role

    def __init__(self, config: Config, name: str, say: Callable[[str], None]) -> None:
        """`name` is the run's: in the dashboard an actor is NAME/ROLE-NUMBER. `say` hears of faults that are
        survived."""
        self.config, self.name, self.say = config, name, say
        self.metrics = Metrics(name)
        self.room: PlacementGroup | None = None  # for the learner ranks
        self._actors: list[Any] = []
        self._numbers: Counter[str] = Counter()  # actors of each role so far
        # Actors' names are looked up by nobody, and must not clash with those of another run of the same name.
        self._namespace = f"tributary-{uuid.uuid4().hex}"

    def spawn(self, role: str, shell: type, options: dict[str, Any], *arguments: Any) -> Any:
        """Start an actor of a shell class; one that takes another's place has the next number.

        Raises:
            DeadlineExceeded: the cluster's control store is silent, and creating an actor would wait for it.
        """
        alive_nodes()
        self._numbers[role] += 1
        name = f"{self.name}/{role}-{self._numbers[role]}"
        actor = ray.remote(shell).options(name=name, namespace=self._namespace, **options).remote(*arguments)
        self._actors.append(actor)
        return actor

    def start(self, placement: Placement, parts: Parts) -> None:
        """Start samplers and reward actors."""
        shares_gpu = any(share.gpus % 1 > 0 for share in (placement.samplers, placement.scorers))

        def role(name: str, plural: str, doing: str, share: Share, shell: type, build: Callable[[], Any]) -> Role:
            spawn = partial(self.spawn, name, shell, share.spread, build, shares_gpu)
            return Role(name, plural, doing, share, spawn, [spawn() for _ in range(share.count)])

        self.samplers = role("sampler", "samplers", "sampling", placement.samplers, SamplerActor, parts.sampler)
        self.scorers = role("scorer", "reward actors", "scoring", placement.scorers, RewardActor, parts.scorer)

    def await_ready(self, deadline: float) -> None:
        """Until all samplers and reward actors are up. `deadline` is of time.monotonic.

        Raises:
            DeadlineExceeded: they are not; says who is missing, and what the cluster has.
            ActorDied: an actor could not start; the message has its error.
        """
        ready([self.samplers.ask("ready"), self.scorers.ask("ready")], deadline, self.config.run.ready_seconds)

    def pool(self, role: Role, lost: Callable[[Any], None]) -> Pool:
        """Of the role's actors, which are up; `lost` hears of every chunk that has to be made again."""
        run, failed = self.config.run, partial(self.metrics.failed, role.name)
        limits = Limits(run.chunk_seconds, run.ready_seconds, run.chunk_attempts)
        return Pool(role.doing, role.started, role.spawn, limits, Listener(self.say, lost, failed))

    def dismiss(self) -> None:
        """Take away all that was started, in CLOSE_SECONDS at most."""
        leaving = threading.Thread(target=self._dismiss, daemon=True)  # Ray's calls take no deadline
        leaving.start()
        leaving.join(CLOSE_SECONDS)

    def _dismiss(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        if self.room is not None:
            ray.util.remove_placement_group(self.room)
        self._actors, self.room = [], None
