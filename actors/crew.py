"""What a run has on the cluster, its actors and the room for its learner ranks: all of it goes when the run does."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from actors.reward_actor import RewardActor
from actors.sampler_actor import SamplerActor
from cluster.nodes import alive_nodes
from cluster.placement import Placement
from cluster.session import CLOSE_SECONDS
from learner.build import Parts


class Crew:
    """Starts actors and keeps count of them."""

    def __init__(self, name: str) -> None:
        """`name` is the run's: in the dashboard an actor is NAME/ROLE-NUMBER."""
        self.name = name
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

    def makers(self, placement: Placement, parts: Parts) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """What starts a sampler, and what starts a reward actor; a replacement comes from the same."""
        gives = [options.get("num_gpus", 1.0) for options in (placement.sampler_options, placement.scorer_options)]
        shares_gpu = any(share % 1 > 0 for share in gives)
        return (
            partial(self.spawn, "sampler", SamplerActor, placement.sampler_options, parts.sampler, shares_gpu),
            partial(self.spawn, "scorer", RewardActor, placement.scorer_options, parts.scorer, shares_gpu),
        )

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
