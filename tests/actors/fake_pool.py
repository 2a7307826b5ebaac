"""Actors that never were, for a pool: references are done when the test says so, and time stands still."""

from actors.pool import Pool
from cluster.waits import ActorDied
from learner.config import load_config


class FakeActor:
    """Hands out references that are done when the test says so. Asked whether it is there, it answers once it is up,
    unless it is silent."""

    def __init__(self, world, name: str, up: bool = True) -> None:
        self.world, self.name, self.up = world, name, up
        self.calls, self.asked, self.dead, self.silent = [], 0, False, False
        self.work, self.ready = Method(self._work), Method(self._ready)

    def _work(self, *arguments):
        ref = (self.name, *arguments)
        self.calls.append(ref)
        if self.dead:
            self.world.failed[ref] = ActorDied(f"{self.name} is gone")
        return [("big", ref), ref]

    def _ready(self):
        self.asked += 1
        return ("ready", self, self.asked)


class Method:
    def __init__(self, function) -> None:
        self.remote = function


class World:
    """What Ray would know: finished references, failed ones, time."""

    def __init__(self) -> None:
        self.done, self.failed, self.killed, self.spawned, self.said, self.lost = set(), {}, [], [], [], []
        self.now = 0.0

    def actors(self, *names):
        return [FakeActor(self, name) for name in names]

    def done_of(self, refs, seconds=0.0):
        return [ref for ref in refs if self.is_done(ref)]

    def is_done(self, ref) -> bool:
        if ref[0] == "ready":
            return ref[1].dead or (ref[1].up and not ref[1].silent)
        return ref in self.done or ref in self.failed

    def get(self, ref, *_):
        if ref[0] == "ready" and ref[1].dead:
            raise ActorDied(f"{ref[1].name} is gone")
        if ref in self.failed:
            raise self.failed[ref]
        return f"summary of {ref[1]}"

    def kill(self, actor):
        self.killed.append(actor)
        self.die(actor)

    def die(self, *actors):
        for actor in actors:
            actor.dead = True
            self.failed |= {ref: ActorDied(f"{actor.name} is gone") for ref in actor.calls if ref not in self.done}

    def spawn(self):
        self.spawned.append(FakeActor(self, f"spare{len(self.spawned)}", up=False))
        return self.spawned[-1]

    def start_all(self):
        """Those that were spawned are up."""
        for actor in self.spawned:
            actor.up = True

    def pool(self, actors, seconds=10.0, ready=10.0, attempts=3, call=lambda actor, key: actor.work.remote(key)):
        limits = {"chunk_seconds": seconds, "ready_seconds": ready, "chunk_attempts": attempts}
        config = load_config(overrides=[f"run.{name}={limit}" for name, limit in limits.items()])
        first = iter(actors)
        return Pool(
            "sampling", len(actors), lambda: next(first, None) or self.spawn(), call, config,
            lambda error, way_on: self.said.append(f"{error}: {way_on}"), self.lost.append, "remedy {}".format,
        )  # fmt: skip


def submit(pool, *keys) -> None:
    for key in keys:
        pool.submit(key)


def finish(world, pool, rounds=200) -> list:
    """Let everything that was handed out be done until the pool is idle; the keys that came back."""
    seen = []
    for _ in range(rounds):
        if pool.load() == (0, 0):
            return seen
        for actor in pool.actors:
            if not actor.silent:
                world.done.update(ref for ref in actor.calls if ref not in world.failed)
        world.start_all()
        seen += [key for key, _, _ in pool.pump()]
    raise AssertionError("the pool never became idle")
