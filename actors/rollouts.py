"""Chunks through samplers and reward actors: for training, and for evaluation with or without a learner.
Weights travel with each call, so a chunk is sampled with those that are the newest when a sampler is free for it."""

import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray

from actors import texts
from actors.crew import Crew
from actors.pool import Pool
from actors.shells import RewardActor, SamplerActor
from cluster.placement import Progress, ready
from cluster.waits import ObjectLost, done, get, put
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, ChunkKey, Scores
from learner import build
from learner.config import Config
from learner.prompts import training_prompts
from learner.protocol.buffer import Buffer
from learner.protocol.ledger import Ledger
from rewards.contract import Reward

POLL_SECONDS = 0.25
AT_ONCE = 4  # chunks that a reward actor has under way where it waits for a judge behind HTTP, not for its own work
SHOWN_CHARACTERS = 1000  # of a chunk's prompts
Take = Callable[[Chunk, Scores], None]
REMEDIES = {
    "sampler": "a smaller sampler.chunk_size takes less memory",
    "scorer": "leave out the one that ends the reward's process, or have the reward raise an error for it "
    "(reward.on_bad_reward=quarantine sets such trajectories aside)",
}


class Rollouts:
    """Not a thread: the owner drives it with `pump`."""

    def __init__(self, crew: Crew, parts: build.Parts) -> None:
        """Starts the actors; `await_ready` comes first."""
        self.crew, self.config, self.description, self.close = crew, crew.config, crew.description, crew.close
        self.buffer = Buffer(lambda epoch: [], range(0), 0, Ledger())  # without a learner nothing is trained
        self.score_batch = self.config.reward.batch  # in evaluations by size alone: the same figures everywhere
        self.made_again: Counter[ChunkKey] = Counter()
        self.sampled_at = 0.0  # when the last training chunk came from a sampler
        self.shares = {"sampler": crew.placement.samplers, "scorer": crew.placement.scorers}
        self.samplers = self._pool("sampler", "sampling", SamplerActor, parts.sampler, self._sample)
        self.scorers = self._pool("scorer", "scoring", RewardActor, parts.scorer, self._score)
        self.pools = {"sampler": self.samplers, "scorer": self.scorers}

    def _pool(self, role: str, doing: str, shell: type, part: Callable[[], Any], call: Callable[..., Any]) -> Pool:
        shares_gpu = any(share.gpus % 1 > 0 for share in self.shares.values())
        at_once = AT_ONCE if role == "scorer" and self.config.reward.name == "remote" else 1
        options = self.shares[role].spread | ({"max_concurrency": at_once} if at_once > 1 else {})
        spawn = partial(self.crew.spawn, role, shell, options, part, shares_gpu)
        hears = partial(self.crew.failed, role), partial(self._lost, role), partial(self._remedy, role)
        return Pool(doing, self.shares[role].count, spawn, call, self.config, *hears, at_once)

    def await_ready(
        self, deadline: float, latent: tuple[int, int, int] | None = None, progress: Progress = lambda done, total: None
    ) -> None:
        """Until all actors are up; `progress` hears how many are, again and again. Given the shape of a latent, then
        finds how many images at once every reward actor's share of its free GPU memory holds. Raises DeadlineExceeded
        and ActorDied, as cluster.placement.ready does."""
        self._answers("ready", deadline, ["sampler", "scorer"], progress=progress)
        if latent is not None:
            share = min(1.0, self.shares["scorer"].gpus or 1.0)
            arguments = latent, training_prompts(self.config)[0], self.config.model.device, share
            self.score_batch = min(self._answers("fitting_batch", deadline, ["scorer"], *arguments, progress=progress))

    def _answers(
        self, method: str, deadline: float, roles: list[str], *arguments: Any, progress: Progress
    ) -> list[Any]:
        calls = {
            role: [getattr(actor, method).remote(*arguments) for actor in self.pools[role].calls] for role in roles
        }
        asked = {f"{role}s": (self.shares[role], refs) for role, refs in calls.items()}
        return ready(asked, deadline, self.config.run.ready_seconds, progress)

    def publish(self, snapshot: Snapshot) -> None:
        """The weights for what no sampler has yet: one object of the driver's, which outlives whoever made it. Older
        ones are freed once no call uses them. Raises StoreFull if the object store has no room."""
        self._ref = put(snapshot, f"publishing policy version {snapshot.version}")
        self._snapshot = snapshot

    def pump(self) -> None:
        """Hand out what there is room for and take in what is done, without blocking. Raises StaleWeights; ActorDied,
        DeadlineExceeded or ObjectLost of a chunk lost run.chunk_attempts times; BadReward, and what parts raise."""
        record = self.crew.metrics.record
        for key, (trajectories, clean), receipt in self.samplers.pump():
            self.buffer.sampled(key, receipt, trajectories, clean)
            record("receipts", 1, outcome="verified")
            record("trajectories", len(receipt.log_pf_sum), stage="sampled")
            record("chunk_seconds", receipt.seconds, role="sampler")
            if key.purpose == "train":
                self.sampled_at = time.perf_counter()
            self.scorers.submit(key, first=key.purpose == "evaluate")
        for key, (scores,), verdict in self.scorers.pump():
            self.buffer.scored(key, verdict, scores)
            record("trajectories", len(verdict.rewards), stage="scored")
            record("chunk_seconds", verdict.seconds, role="scorer")
        for pool in self.pools.values():  # the weights could not be fetched; a node went with its objects
            while pool.inputs_lost:
                self.make_again(pool.inputs_lost.pop())

    def make_again(self, key: ChunkKey) -> None:
        """What was made of a chunk is gone. Raises ObjectLost if it is for the run.chunk_attempts-th time."""
        self.made_again[key] += 1
        self._lost("object store", key)
        if (times := self.made_again[key]) >= self.config.run.chunk_attempts:
            raise ObjectLost(f"{key} was made and lost {times} times (run.chunk_attempts)")
        self.samplers.submit(key, first=True)

    def evaluate(self, chunks: Sequence[Chunk], take: Take, pump: Callable[[], None]) -> None:
        """Before all that wait. `take` gets each chunk as it is scored; `pump` is this object's or calls that."""
        self.buffer.add(chunks)
        for chunk in reversed(chunks):
            self.samplers.submit(chunk.key, first=True)
        while True:
            pump()
            for work in [work for work in self.buffer.part("evaluate") if work.verdict is not None]:
                key = work.chunk.key
                try:
                    scores = get(work.scores, self.config.run.chunk_seconds, f"images of {key}", "run.chunk_seconds")
                except ObjectLost as error:  # with the node of the reward actor that made them
                    self.crew.say(f"{error}: will be made again")
                    self.make_again(key)
                else:
                    del self.buffer.works[key]
                    take(work.chunk, scores)
            if not self.buffer.part("evaluate"):
                return
            self.pause()

    def judge(self, snapshot: Snapshot, chunks: Sequence[Chunk], take: Take) -> None:
        """As evaluation/image_sets.py's Pools say; raises what `pump` does."""
        self.publish(snapshot)
        self.made_again.clear()
        self.evaluate(chunks, take, self.pump)

    def pause(self, also: Sequence[ray.ObjectRef] = ()) -> None:
        """A little, for an actor's answer or one of these."""
        done([*also, *self.samplers.waiting_on, *self.scorers.waiting_on], POLL_SECONDS, enough=1)

    def _sample(self, sampler: Any, key: ChunkKey) -> list[ray.ObjectRef]:
        self.buffer.given(key, self._snapshot)
        return sampler.sample.remote(self.buffer.works[key].chunk, self._ref)

    def _score(self, scorer: Any, key: ChunkKey) -> list[ray.ObjectRef]:
        return scorer.score.remote(self.buffer.works[key].clean, self.score_batch)

    def _lost(self, where: str, key: ChunkKey) -> None:
        self.crew.metrics.record("lost_chunks", 1, where=where)
        if where != "scorer":  # the next scorer gets the same clean predictions
            self.buffer.lose(key)

    def _remedy(self, role: str, key: ChunkKey) -> str:
        prompts = ", ".join(map(repr, dict.fromkeys(self.buffer.works[key].chunk.prompts)))
        return f"its prompts: {textwrap.shorten(prompts, SHOWN_CHARACTERS)}; {REMEDIES[role]}"


def evaluation_pools(config: Config, say: Callable[[str], None], own_reward: Reward | None = None) -> Rollouts:
    """Without a learner. Raises PlacementError, ActorDied or DeadlineExceeded if they cannot start."""
    crew = Crew(config, "evaluation", say)
    try:
        parts = texts.prepare(crew)(build.parts(config, own_reward))
        crew.place(learner=False)
        rollouts = Rollouts(crew, parts)
        rollouts.await_ready(time.monotonic() + config.run.ready_seconds)
        return rollouts
    except BaseException:
        crew.close()
        raise
