"""Chunks on their way, in 1,000 random orders (slow: 10,000) of everything that may happen to them, crashes and resumes
included."""

import random
from collections import Counter

import numpy as np
import pytest

from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, Receipt, Verdict
from learner.protocol.buffer import Buffer
from learner.protocol.ledger import Ledger
from learner.protocol.receipts import StaleWeights

EPOCHS, CHUNKS, SIZE = 4, 2, 2
VERDICT = Verdict((0.0,) * SIZE, (), 0.0)


def chunks_of(epoch: int) -> list[Chunk]:
    return [Chunk(i, "train", epoch, 0, ("a prompt",) * SIZE, (i * SIZE, i * SIZE + 1)) for i in range(CHUNKS)]


def snapshot(version: int) -> Snapshot:
    return Snapshot(version, np.zeros(1, np.float32), f"adapter {version}")


def receipt(held: Snapshot) -> Receipt:
    return Receipt(held.version, held.sha256, (0.0,) * SIZE, (0.0,) * SIZE, "here", 0.0)


class Run:
    """A driver that does whatever comes next in no particular order, and keeps its own account of what must be true."""

    def __init__(self, staleness: int, rng: random.Random) -> None:
        self.staleness, self.rng = staleness, rng
        self.saved = Ledger().to_json()  # the last checkpoint
        self.trained: Counter[tuple[int, int]] = Counter()
        self.begin()

    def begin(self) -> None:
        """From the last checkpoint: of what came after it, nothing is known any more."""
        self.ledger = Ledger(self.saved)
        self.version = self.epoch = done = self.ledger.epochs
        self.buffer = Buffer(chunks_of, range(done, EPOCHS), self.staleness, self.ledger)
        self.waiting, self.sampling, self.scoring, self.scored = [], {}, [], []
        self.made_by = {}  # version that sampled each key, by our own account
        self.is_trained = False
        self.trained = Counter({place: n for place, n in self.trained.items() if place[0] < done})

    def steps(self) -> dict[str, bool]:
        whole = sum(key.epoch == self.epoch for key in self.scored) == CHUNKS
        return {
            "give": bool(self.waiting), "sample": bool(self.sampling), "score": bool(self.scoring),
            "admit": self.ledger.following < min(EPOCHS, self.epoch + self.staleness + 1) and not self.is_trained,
            "train": whole and not self.is_trained and self.epoch < EPOCHS, "close": self.is_trained,
        }  # fmt: skip

    def step(self) -> None:
        possible = [name for name, can in self.steps().items() if can]
        assert possible, f"nothing can happen in epoch {self.epoch}: a deadlock"
        getattr(self, self.rng.choice(possible))()
        in_work = {key.epoch for key in self.buffer.works}
        assert len(in_work) <= self.staleness + 1
        for epoch in in_work:
            part = self.buffer.part("train", epoch)
            assert [work.chunk for work in part] == chunks_of(epoch)
            assert {work.chunk.key for work in part if work.verdict} == {k for k in self.scored if k.epoch == epoch}
        for key, version in self.made_by.items():
            assert 0 <= key.epoch - version <= self.staleness

    def admit(self) -> None:
        self.waiting += [chunk.key for chunk in self.buffer.admit()]

    def give(self) -> None:
        key = self.waiting[self.rng.randrange(len(self.waiting))]
        too_old = key.epoch - self.staleness - 1
        for wrong in {max(too_old, -1), key.epoch + 1} - {-1}:
            with pytest.raises(StaleWeights, match=f"policy version {wrong}: train.max_staleness is {self.staleness}"):
                self.buffer.given(key, snapshot(wrong))
        self.buffer.given(key, snapshot(self.version))
        self.waiting.remove(key)
        self.sampling[key] = self.made_by[key] = self.version

    def sample(self) -> None:
        key = self.rng.choice(list(self.sampling))
        held = snapshot(self.sampling.pop(key))
        with pytest.raises(StaleWeights):
            self.buffer.sampled(key, receipt(snapshot(held.version + 1)), "trajectories")
        self.buffer.sampled(key, receipt(held), "trajectories")
        self.scoring.append(key)

    def score(self) -> None:
        key = self.scoring.pop(self.rng.randrange(len(self.scoring)))
        self.buffer.scored(key, VERDICT, "scores")
        self.scored.append(key)

    def lose(self) -> None:
        at_risk = [*self.sampling, *self.scoring, *([] if self.is_trained else self.scored)]
        if not at_risk:
            return
        key = self.rng.choice(at_risk)
        self.sampling.pop(key, None)
        for place in (self.scoring, self.scored):
            if key in place:
                place.remove(key)
        del self.made_by[key]
        self.buffer.lose(key)
        self.waiting.append(key)

    def train(self) -> None:
        for wrong in {self.version - 1, self.version + 1}:
            with pytest.raises(StaleWeights, match=f"epoch {self.epoch} was to be trained by policy version {wrong}"):
                self.buffer.take(self.epoch, wrong)
        works = self.buffer.take(self.epoch, self.version)
        for work in works:
            chunk, made, _ = work.account()
            assert made.policy_version == self.made_by[chunk.key]
            assert work.trajectories == "trajectories" and work.scores == "scores"
            self.ledger.advance(self.epoch, chunk.trajectory_ids, "trained")
            self.trained.update((self.epoch, number) for number in chunk.trajectory_ids)
        self.version += 1
        self.is_trained = True

    def close(self) -> None:
        self.ledger.close(self.epoch)
        self.saved = self.ledger.to_json()
        self.buffer.close(self.epoch)
        self.scored = [key for key in self.scored if key.epoch != self.epoch]
        self.epoch += 1
        self.is_trained = False


@pytest.mark.parametrize("orders", [250, pytest.param(2500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_the_bound_holds_and_everything_is_trained_once_in_any_order(staleness, orders):
    seen = Counter()
    for seed in range(orders):
        run = Run(staleness, random.Random(f"{staleness} {seed}"))
        trouble = run.rng.choice([0.0, 0.02, 0.2])
        for _ in range(2000):
            if run.ledger.epochs == EPOCHS:
                break
            seen["most at once"] = max(seen["most at once"], run.buffer.in_work)
            if run.rng.random() < trouble:
                event = run.rng.choices(["lose", "begin"], [4, 1])[0]
                seen[event] += 1
                getattr(run, event)()
            else:
                run.step()
        else:
            raise AssertionError(f"seed {seed} did not come to an end")
        assert run.trained == Counter((e, i) for e in range(EPOCHS) for i in range(CHUNKS * SIZE)), f"seed {seed}"
        counted = dict(run.ledger.totals)
        assert counted.pop("lost") >= 0 and counted.pop("quarantined") == 0, f"seed {seed}"
        assert set(counted.values()) == {EPOCHS * CHUNKS * SIZE}, f"seed {seed}"
        behind = max(key.epoch - version for key, version in run.made_by.items() if key.epoch == EPOCHS - 1)
        seen["most behind"] = max(seen["most behind"], behind)
    # The orders that matter were among them.
    assert seen["most at once"] == staleness + 1 and seen["most behind"] == staleness
    assert seen["lose"] > 0.4 * orders and seen["begin"] > 0.12 * orders


def test_an_evaluation_goes_through_without_the_ledger_and_leaves():
    buffer = Buffer(chunks_of, range(0), 0, Ledger())
    chunk = Chunk(0, "evaluate", 0, 0, ("a prompt",) * SIZE, (0, 1))
    buffer.add([chunk])
    for _ in range(2):
        buffer.given(chunk.key, snapshot(3))
        buffer.lose(chunk.key)
    buffer.given(chunk.key, snapshot(3))
    buffer.sampled(chunk.key, receipt(snapshot(3)), "trajectories")
    buffer.scored(chunk.key, VERDICT, "scores")
    assert [work.scores for work in buffer.part("evaluate")] == ["scores"]
    assert buffer.in_work == 0 and not any(buffer.ledger.totals.values())
