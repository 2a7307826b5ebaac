"""The learner ranks as one: they start together, train together and, when one is lost, start anew together from the
last checkpoint. Training is a function of that checkpoint and the trajectories, so its result is the same."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.pool import PING_SECONDS, silence
from actors.shells import ScoredRefs
from cluster.waits import ActorDied, DeadlineExceeded, ObjectLost, done, get, put
from diffusion.snapshot import Snapshot
from learner.process_group import GroupBroken
from learner.protocol import receipts
from learner.protocol.runner import Training

GONE = (ActorDied, DeadlineExceeded, GroupBroken, ObjectLost)  # an answer may be lost with its node too
HEAR_SECONDS = 1.0  # between a rank's failure and the others' noticing it


class RanksLost(RuntimeError):
    """The group is of no use any more. Its own type, because while the ranks work the pools do too (`meanwhile`), and
    fail in the same ways."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True)
class Shape:
    """Of a group: its size, how an epoch is divided, its deadlines (settings of the config's `run`)."""

    ranks: int
    updates: int  # an epoch's chunks are so many equal parts
    train_seconds: float  # an epoch's training, a collective
    chunk_seconds: float  # fetching; an idle rank's answer
    ready_seconds: float  # starting


class LearnerGroup:
    """Dispatches to the ranks and waits for all of them. The first rank's failure is the group's: others would only
    notice it later, in the collective that they wait in."""

    def __init__(
        self, spawn: Callable[[int], Any], shape: Shape, meanwhile: Callable[[list[ray.ObjectRef]], None],
        failed: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        """`spawn` starts the actor of a rank. `meanwhile` is called while an answer is awaited: it waits for one of the
        references it gets, for a second at most, and may do other work. `failed` hears of every failure of a rank."""
        self.shape = shape
        self._spawn, self._meanwhile, self._failed = spawn, meanwhile, failed
        self._actors: list[Any] = []
        self._pings: list[ray.ObjectRef] = []
        self._asked = 0.0  # when the ranks were last asked whether they live

    def start(self, files: dict[str, bytes] | None, deadline: float) -> tuple[Snapshot, tuple[int, int, int]]:
        """Start the ranks, from a checkpoint's files if there are any, until `deadline` (of time.monotonic). Returns
        the policy version that the group holds and the shape of a latent.

        Raises:
            RanksLost: not all were up in time, or one could not start.
        """
        what = f"starting {self.shape.ranks} learner ranks"
        self._actors = [self._spawn(rank) for rank in range(self.shape.ranks)]
        state = put(files, "sharing the checkpoint")
        # All are up before any looks for the others: that has the shorter deadline of a collective.
        address = self._start_answers([actor.address.remote() for actor in self._actors], deadline, what)[0]
        starts = [actor.start.remote(address, self.shape.train_seconds, state) for actor in self._actors]
        return self._start_answers(starts, deadline, what)[0]

    def fit_micro_batch(self, share: float, deadline: float) -> int:
        """Transitions at once that every rank's share of its free GPU memory holds."""
        calls = [actor.fit_micro_batch.remote(share) for actor in self._actors]
        return min(self._start_answers(calls, deadline, f"starting {self.shape.ranks} learner ranks"))

    def fetch(self, epoch: int, pairs: Sequence[ScoredRefs]) -> list[int]:
        """Have every rank get its share of the epoch, whose chunks are `pairs` in their order. Returns places in
        `pairs` whose objects are lost: nothing is trained then."""
        shares = [self._share(range(len(pairs)), rank) for rank in range(self.shape.ranks)]
        limit = self.shape.chunk_seconds
        calls = [
            actor.fetch.remote(epoch, [[pairs[i] for i in update] for update in share], limit)
            for actor, share in zip(self._actors, shares, strict=True)
        ]
        answers = self._answers(calls, f"fetching epoch {epoch}", "run.chunk_seconds", limit)
        return sorted(share[i][j] for share, lost in zip(shares, answers, strict=True) for i, j in lost)

    def train(self, epoch: int, beta: float) -> tuple[list[Training], Snapshot, dict[str, bytes]]:
        """Train on what was fetched: each rank's account, the next policy version, and the files of a checkpoint.

        Raises:
            RanksLost: start, fetch and train again.
            RanksDiverged: the ranks hold different adapters.
        """
        calls = [actor.train_epoch.remote(epoch, beta) for actor in self._actors]
        answers = self._answers(calls, f"training of epoch {epoch}", "run.train_seconds", self.shape.train_seconds)
        receipts.check_ranks([sha256 for _, sha256, _ in answers])
        return [training for training, _, _ in answers], answers[0][2], self.state_files()

    def state_files(self) -> dict[str, bytes]:
        """What all ranks add to a checkpoint. They pass through the driver, which writes them: the ranks' nodes need
        not see the run directory."""
        calls = [actor.state_files.remote() for actor in self._actors]
        parts = self._answers(calls, "a checkpoint", "run.train_seconds", self.shape.train_seconds)
        return {name: content for part in parts for name, content in part.items()}

    @property
    def alive(self) -> int:
        """Ranks that were started and not stopped."""
        return len(self._actors)

    def look(self) -> None:
        """Ask the idle ranks now and then whether they live; takes no time.

        Raises:
            RanksLost: one does not, or has not answered for chunk_seconds.
        """
        self._listen()
        now = time.monotonic()
        if not self._pings and now - self._asked > PING_SECONDS:
            self._asked, self._pings = now, [actor.ready.remote() for actor in self._actors]

    def _listen(self) -> None:
        """To those that were asked while idle: what they are told to do since then comes after their answer."""
        limit = self.shape.chunk_seconds
        for ref in done(self._pings):
            self._pings.remove(ref)
            self._get(ref, "an idle learner rank", "run.chunk_seconds")
        if self._pings and time.monotonic() - self._asked > silence(limit):
            raise self._lost(DeadlineExceeded(f"an idle learner rank did not answer in run.chunk_seconds={limit:g} s"))

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors, self._pings = [], []

    def _share(self, places: Sequence[int], rank: int) -> list[Sequence[int]]:
        """This rank's chunks of each update: every update is the same set of chunks whatever the ranks."""
        size = len(places) // self.shape.updates
        return [places[i * size : (i + 1) * size][rank :: self.shape.ranks] for i in range(self.shape.updates)]

    def _start_answers(self, calls: list[ray.ObjectRef], deadline: float, what: str) -> list[Any]:
        setting = f"run.ready_seconds={self.shape.ready_seconds:g}"
        return self._answers(calls, what, setting, max(0.0, deadline - time.monotonic()))

    def _answers(self, calls: list[ray.ObjectRef], what: str, setting: str, seconds: float) -> list[Any]:
        deadline, answers = time.monotonic() + seconds, {}
        while True:
            for ref in done([ref for ref in calls if ref not in answers]):
                try:
                    answers[ref] = self._get(ref, what, setting)
                except RanksLost as lost:
                    if isinstance(lost.cause, GroupBroken):  # by a rank that failed, or is gone
                        self._hear_the_others([other for other in calls if other != ref], what, setting)
                    raise
            if len(answers) == len(calls):
                return [answers[ref] for ref in calls]
            if time.monotonic() > deadline:
                limit = setting if "=" in setting else f"{setting}={seconds:g}"
                raise self._lost(DeadlineExceeded(f"{what} took longer than {limit} s"))
            self._listen()
            self._meanwhile([ref for ref in calls if ref not in answers])

    def _get(self, ref: ray.ObjectRef, what: str, setting: str) -> Any:
        """What a rank has answered, or the error it raised."""
        try:
            return get(ref, self.shape.chunk_seconds, what, setting)
        except GONE as error:
            raise self._lost(error) from error
        except Exception as error:
            self._failed(error)
            raise

    def _hear_the_others(self, calls: list[ray.ObjectRef], what: str, setting: str) -> None:
        """Raise what another rank has failed with, if it is the data's or the code's: that would be so again."""
        for ref in done(calls, HEAR_SECONDS):
            with contextlib.suppress(*GONE):
                get(ref, self.shape.chunk_seconds, what, setting)

    def _lost(self, cause: Exception) -> RanksLost:
        self._failed(cause)
        return RanksLost(cause)
