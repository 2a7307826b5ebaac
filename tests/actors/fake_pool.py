"""Actors that never were, for a pool: references are done when the test says so, and time stands still."""

from types import SimpleNamespace

from actors.pool import Pool
from cluster.waits import ActorDied
from learner.config import load_config


class FakeActor:
    """Hands out references that are done when the test says so. Asked whether it is there, it answers once it is up,
    unless it is silent."""

    def __init__(self, world, name: str, up: bool) -> None:
        self.world, self.name, self.up = world, name, up
        self.calls, self.asked, self.dead, self.silent = [], 0, False, False
        self.ready = SimpleNamespace(remote=self._ready)

    def work(self, argument):
        ref = (self.name, argument)
        self.calls.append(ref)
        if self.dead:
            self.world.failed[ref] = ActorDied(f"{self.name} is gone")
        return [("big", ref), ref]

    def _ready(self):
        self.asked += 1
        return ("ready", self, self.asked)


class World:
    """What Ray would know: finished references, failed ones, time."""

    def __init__(self) -> None:
        self.done, self.failed, self.killed, self.spawned, self.said, self.lost = set(), {}, [], [], [], []
        self.now = 0.0

    def done_of(self, refs, seconds=0.0):
        def answers(actor) -> bool:
            return actor.dead or (actor.up and not actor.silent)

        known = self.done | self.failed.keys()
        return [ref for ref in refs if (answers(ref[1]) if ref[0] == "ready" else ref in known)]

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

    def pool(self, names, keys=0, seconds=10.0, ready=10.0, attempts=3, call=FakeActor.work, at_once=1):
        """Of actors that are up, by name, with keys submitted and handed out: (pool, *actors)."""
        limits = {"chunk_seconds": seconds, "ready_seconds": ready, "chunk_attempts": attempts}
        config = load_config(overrides=[f"run.{name}={limit}" for name, limit in limits.items()])
        first = [FakeActor(self, name, up=True) for name in names.split()]
        waiting = iter(first)

        def spawn():
            if (actor := next(waiting, None)) is None:
                actor = FakeActor(self, f"spare{len(self.spawned)}", up=False)
                self.spawned.append(actor)
            return actor

        def failed(error, way_on):
            self.said.append(f"{error}: {way_on}")

        pool = Pool("sampling", len(first), spawn, call, config, failed, self.lost.append, "remedy {}".format, at_once)
        submit(pool, *range(keys))
        assert pool.pump() == []
        return pool, *first

    def start_all(self):
        """Those that were spawned are up."""
        for actor in self.spawned:
            actor.up = True

    def finish(self, pool) -> list:
        """Let everything that was handed out be done until the pool is idle; the keys that came back, sorted."""
        keys = []
        for _ in range(200):
            if pool.load() == (0, 0):
                return sorted(keys)
            for actor in pool.calls:
                if not actor.silent:
                    self.done.update(ref for ref in actor.calls if ref not in self.failed)
            self.start_all()
            keys += [key for key, _, _ in pool.pump()]
        raise AssertionError("the pool never became idle")


def submit(pool, *keys) -> None:
    for key in keys:
        pool.submit(key)
