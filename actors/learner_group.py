"""The learner ranks as one: they start together, train together and, when one is lost, start anew together from the
last checkpoint. Training is a function of that checkpoint and the trajectories, so its result is the same."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from actors.crew import Crew
from actors.pool import PING_SECONDS, Probes
from actors.shells import Build, LearnerActor, ScoredRefs
from cluster.placement import in_group
from cluster.waits import ActorDied, ObjectLost, done, get, put
from diffusion.failures import DeadlineExceeded
from diffusion.snapshot import Snapshot
from learner.process_group import GroupBroken
from learner.protocol import receipts
from learner.protocol.runner import Training

GONE = (ActorDied, DeadlineExceeded, GroupBroken, ObjectLost)  # an answer may be lost with its node too
HEAR_SECONDS = 1.0  # between a rank's failure and the others' noticing it


class RanksLost(RuntimeError):
    """The group is of no use any more; its argument is the error that says why. Its own type, because while the ranks
    work the pools do too (`meanwhile`), and fail in the same ways."""


class LearnerGroup:
    """Dispatches to the ranks and waits for all of them. The first rank's failure is the group's (RanksLost, from every
    method): others would only notice it later, in the collective that they wait in."""

    def __init__(
        self, crew: Crew, build: Build, meanwhile: Callable[[list[ray.ObjectRef]], None],
        trained: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:  # fmt: skip
        """`meanwhile` is called while an answer is awaited: it waits a little for one of these, and does other work.
        `trained` hears how many transitions of the epoch the first rank has trained, of how many."""
        self.crew, self.build, self.ranks = crew, build, crew.placement.ranks.count
        self._run, self._meanwhile, self._trained = crew.config.run, meanwhile, trained
        self.actors: list[Any] = []
        self._idle = Probes("an idle learner rank", "run.chunk_seconds", self._run.chunk_seconds)

    def start(self, files: dict[str, bytes] | None, deadline: float) -> tuple[Snapshot, tuple[int, int, int]]:
        """Start the ranks, or others in their place, from a checkpoint's files if there are any, until `deadline` (of
        time.monotonic). Returns the policy version that they hold and the shape of a latent."""
        for actor in self.actors:
            self._idle.open.pop(actor, None)
            ray.kill(actor)
        self.actors, what = [], f"starting {self.ranks} learner ranks"
        for rank, options in enumerate(in_group(self.crew.placement, self.crew.room)):
            arguments = self.build, rank, self.ranks, options.get("num_gpus") == 1
            self.actors.append(self.crew.spawn("learner", LearnerActor, options, *arguments))
        state = put(files, "sharing the checkpoint")
        # All are up before any looks for the others: that has the shorter deadline of a collective.
        calls = [actor.ready.remote() for actor in self.actors]
        address = self._answers(calls, what, "ready_seconds", deadline)[0]
        calls = [actor.start.remote(address, self._run.train_seconds, state) for actor in self.actors]
        return self._answers(calls, what, "ready_seconds", deadline)[0]

    def fit_micro_batch(self, deadline: float) -> int:
        """Transitions at once that every rank's share of its free GPU memory holds: of all of it, since samplers and
        reward actors rest while ranks train; with train.max_staleness these work beside them, and have their own."""
        gpus = self.crew.placement.ranks.gpus or 1.0
        share = min(1.0, gpus if self.crew.config.train.max_staleness else max(gpus, 1 / self.ranks))
        calls = [actor.fit_micro_batch.remote(share) for actor in self.actors]
        return min(self._answers(calls, f"starting {self.ranks} learner ranks", "ready_seconds", deadline))

    def fetch(self, epoch: int, pairs: Sequence[ScoredRefs]) -> list[int]:
        """Have every rank get its share of the epoch, whose chunks are `pairs` in their order: every update is the same
        set of chunks whatever the ranks. Returns places in `pairs` whose objects are lost: nothing is trained then."""
        size = len(pairs) // self.crew.config.train.updates_per_epoch
        updates = [range(start, start + size) for start in range(0, len(pairs), size)]
        shares = [[update[rank :: self.ranks] for update in updates] for rank in range(self.ranks)]
        calls = [
            actor.fetch.remote(epoch, [[pairs[i] for i in update] for update in share], self._run.chunk_seconds)
            for actor, share in zip(self.actors, shares, strict=True)
        ]
        answers = self._answers(calls, f"fetching epoch {epoch}", "chunk_seconds")
        return sorted(share[i][j] for share, lost in zip(shares, answers, strict=True) for i, j in lost)

    def train(self, epoch: int, beta: float, offset: float) -> tuple[list[Training], Snapshot, dict[str, bytes]]:
        """Train on what was fetched: each rank's account, the next policy version, and the files of a checkpoint.
        Raises RanksDiverged if the ranks hold different adapters."""
        calls = [actor.train_epoch.remote(epoch, beta, offset) for actor in self.actors]
        self._trained(0, 1)
        answers = self._answers(calls, f"training of epoch {epoch}", "train_seconds", follow=True)
        receipts.check_ranks([sha256 for _, sha256, _ in answers])
        return [training for training, _, _ in answers], answers[0][2], self.state_files()

    def state_files(self) -> dict[str, bytes]:
        """What all ranks add to a checkpoint. The driver writes it: the ranks' nodes need not see the run directory."""
        parts = self._answers([actor.state_files.remote() for actor in self.actors], "a checkpoint", "train_seconds")
        return {name: content for part in parts for name, content in part.items()}

    def look(self) -> None:
        """Ask the idle ranks now and then whether they live; takes no time."""
        self._listen()
        self._idle.ask(self.actors, PING_SECONDS)

    def _listen(self) -> None:
        """To those that were asked while idle: what they are told to do since then comes after their answer."""
        for _, error in self._idle.answers():
            if error is not None:
                raise RanksLost(error)

    def _answers(
        self, calls: list[Any], what: str, setting: str, deadline: float | None = None, follow: bool = False
    ) -> list[Any]:
        """Of all ranks, within the seconds of the config's run.`setting` or until `deadline`; while they train `follow`
        asks the first how far it is."""
        asked: list[ray.ObjectRef] = []
        limit, waiting, answers = getattr(self._run, setting), list(calls), {}
        deadline = time.monotonic() + limit if deadline is None else deadline
        while True:
            for ref in done(waiting):
                waiting.remove(ref)
                answers[ref] = self._get(ref, what, calls)
            if not waiting:
                return [answers[ref] for ref in calls]
            if time.monotonic() > deadline:
                raise RanksLost(DeadlineExceeded(f"{what} took longer than run.{setting}={limit:g} s"))
            self._listen()
            if follow:
                asked = self._follow(asked)
            self._meanwhile(waiting)

    def _follow(self, asked: list[ray.ObjectRef]) -> list[ray.ObjectRef]:
        """Tell what the first rank has answered, and ask again. Its failures are heard of elsewhere."""
        for ref in done(asked):
            asked = []
            with contextlib.suppress(*GONE):
                self._trained(*get(ref, self._run.chunk_seconds, "progress", "run.chunk_seconds"))
        return asked or [self.actors[0].progress.remote()]

    def _get(self, ref: ray.ObjectRef, what: str, calls: list[ray.ObjectRef]) -> Any:
        """What a rank has answered. If the group broke, a defect of another rank comes first: it would be so again."""
        seconds, setting = self._run.chunk_seconds, "run.chunk_seconds"
        try:
            return get(ref, seconds, what, setting)
        except GONE as error:
            for other in done(calls, HEAR_SECONDS) if isinstance(error, GroupBroken) else ():
                with contextlib.suppress(*GONE):
                    get(other, seconds, what, setting)
            raise RanksLost(error) from error
