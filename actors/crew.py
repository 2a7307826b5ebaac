"""What a run has on the cluster: a connection, actors and room for the learner ranks. It goes when the run does."""

import threading
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from actors.metrics import Metrics
from cluster.nodes import alive_nodes
from cluster.placement import place_for, reserve
from cluster.session import CLOSE_SECONDS, Session
from learner.config import Config


class Crew:
    """Starts actors, and keeps count of them and of their failures."""

    def __init__(self, config: Config, name: str, say: Callable[[str], None]) -> None:
        """`name` is the run's: in the dashboard an actor is NAME/ROLE-NUMBER. `say` hears of faults survived."""
        self.config, self.name, self.say = config, name, say
        self.room: PlacementGroup | None = None  # for the learner ranks
        self.session, self.metrics = Session(config.run.cpu_threads), Metrics(name)
        self._actors: list[Any] = []
        self._numbers: Counter[str] = Counter()  # actors of each role so far
        # Actors' names are looked up by nobody, and must not clash with those of another run of the same name.
        self._namespace = f"tributary-{uuid.uuid4().hex}"

    def place(self, learner: bool = True) -> None:
        """Find room for the actors, and reserve that of the learner ranks. Raises PlacementError if the cluster's
        resources do not fit the config, DeadlineExceeded if they are not free within run.ready_seconds."""
        self.placement = place_for(self.config, alive_nodes(), learner)
        self.description = f"on Ray: {self.placement.describe()}"
        if learner:
            self.room = reserve(self.placement, self.config.run.ready_seconds)

    def spawn(self, role: str, shell: type, options: dict[str, Any], *arguments: Any) -> Any:
        """Start an actor of a shell class; one that takes another's place has the next number."""
        alive_nodes()  # raises DeadlineExceeded if the control store is silent, for which creating an actor would wait
        self._numbers[role] += 1
        name = f"{self.name}/{role}-{self._numbers[role]}"
        remote = ray.remote(concurrency_groups=getattr(shell, "concurrency_groups", {}))(shell)
        actor = remote.options(name=name, namespace=self._namespace, **options).remote(*arguments)
        self._actors.append(actor)
        return actor

    def failed(self, role: str, error: Exception, way_on: str) -> None:
        """A failure that is survived."""
        self.metrics.record("failures", 1, role=role, error=type(error).__name__)
        self.say(f"{error}: {way_on}")

    def close(self) -> None:
        """A Ray of our own ends with us, actors and all; of another's, what is ours is taken away."""
        if ray.is_initialized() and not self.session.own:
            leaving = threading.Thread(target=self._dismiss, daemon=True)  # Ray's calls take no deadline
            leaving.start()
            leaving.join(CLOSE_SECONDS)
        self.session.close()

    def _dismiss(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        if self.room is not None:
            ray.util.remove_placement_group(self.room)
        self._actors, self.room = [], None
