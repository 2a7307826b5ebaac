"""The in-process runner: one sampler, one scorer, one learner in turns, no Ray: on one GPU they share its memory. Actor
and rank counts do not apply."""

import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import prod

from cluster.deadline import within
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, CleanPredictions, Scores, Trajectories
from learner import build, embeddings
from learner.config import Config
from learner.prompts import training_prompts
from learner.protocol import receipts
from learner.protocol.buffer import Buffer
from learner.protocol.ledger import Ledger
from learner.protocol.runner import EpochResult, Hooks, Vitals
from rewards.contract import Reward

Progress = Callable[[int, int], None]


class InProcessPools:
    """See evaluation/image_sets.py's Pools."""

    description = "in process: 1 sampler, 1 scorer"

    def __init__(
        self, config: Config, own_reward: Reward | None = None, progress: Progress = lambda done, total: None
    ) -> None:
        """`progress` hears how many prompts are embedded, of how many, where that comes first."""
        self.run, self.parts = config.run, build.parts(config, own_reward)
        if embeddings.once(config):
            found = embeddings.embedded(config, lambda missing: build.build_text_encoders(config)(missing), progress)
            self.parts = self.parts.with_embedded(dict(found))
        self.sampler, self.scorer = self.parts.sampler(), self.parts.scorer()

    def judge(self, snapshot: Snapshot, chunks: Sequence[Chunk], done: Callable[[Chunk, Scores], None]) -> None:
        for chunk in chunks:
            trajectories, clean = self.sample(chunk, snapshot)
            receipts.check(trajectories, {snapshot.version: snapshot.sha256}, str(chunk.key))
            done(chunk, self.score(clean))

    def sample(self, chunk: Chunk, snapshot: Snapshot) -> tuple[Trajectories, CleanPredictions]:
        with within(self.run.chunk_seconds, f"sampling {chunk.key}", "run.chunk_seconds"):
            return self.sampler.sample(chunk, snapshot)

    def score(self, clean: CleanPredictions) -> Scores:
        with within(self.run.chunk_seconds, f"scoring {clean.chunk.key}", "run.chunk_seconds"):
            return self.scorer.score(clean)

    def close(self) -> None: ...


class InProcessRunner(InProcessPools):
    """Runs every part in turn in this process. See learner/protocol/runner.py for the contract."""

    description = "in process: 1 sampler, 1 scorer, 1 learner"
    ranks = 1

    def __init__(
        self, config: Config, files: dict[str, bytes] | None, hooks: Hooks, own_reward: Reward | None = None
    ) -> None:
        hooks.progress("loading the model", 0, 2)
        super().__init__(config, own_reward, partial(hooks.progress, "embedding prompts"))
        hooks.progress("loading the model", 1, 2)
        self.config, self.hooks, self.learner = config, hooks, self.parts.learner(files)
        self.learner.model.borrow(self.sampler.model)
        self.learner.tell = partial(hooks.progress, "training")
        self.snapshot, self.dimensions = self.learner.published, prod(self.learner.model.latent_shape)
        self.scorer.batch = config.reward.batch or self.scorer.fitting_batch(
            self.learner.model.latent_shape, training_prompts(config)[0], build.device(config)
        )
        self.batch_sizes = {"micro_batch": self.learner.fit_micro_batch(), "score": self.scorer.batch}

    def begin(self, chunks_of: Callable[[int], Sequence[Chunk]], epochs: range, ledger: Ledger) -> None:
        self.buffer = Buffer(chunks_of, epochs, 0, ledger)  # nothing runs beside the learner here
        self.ledger = ledger

    def train_epoch(self, epoch: int, beta: float, offset: float) -> EpochResult:
        chunks = self.buffer.admit()
        for number, chunk in enumerate(chunks, 1):
            start = time.perf_counter()
            self.buffer.given(chunk.key, self.snapshot)
            trajectories, clean = self.sample(chunk, self.snapshot)
            middle = time.perf_counter()
            self.buffer.sampled(chunk.key, trajectories.receipt(socket.gethostname(), middle - start), trajectories)
            scores = self.score(clean)
            self.buffer.scored(chunk.key, scores.verdict(time.perf_counter() - middle), scores)
            self.hooks.progress("sampling and scoring", number, len(chunks))
        self.learner.tell(0, 1)
        start = time.perf_counter()
        works = self.buffer.take(epoch, self.snapshot.version)
        scored = [(work.trajectories, work.scores) for work in works]
        size = len(scored) // self.config.train.updates_per_epoch
        updates = [scored[start : start + size] for start in range(0, len(scored), size)]
        with within(self.run.train_seconds, f"training of epoch {epoch}", "run.train_seconds"):
            training = self.learner.train_epoch(epoch, beta, updates, offset)
        self.ledger.advance(epoch, (bad.trajectory_id for bad in training.set_aside), "quarantined")
        self.ledger.advance(epoch, training.trajectory_ids, "trained")
        self.snapshot = self.learner.publish(self.snapshot.version + 1)
        accounts = [work.account() for work in works]
        sampling = sum(receipt.seconds for _, receipt, _ in accounts)
        scoring = sum(verdict.seconds for _, _, verdict in accounts)
        return EpochResult(accounts, training, training.set_aside, sampling, scoring, time.perf_counter() - start)

    def evaluate(self, chunks: Sequence[Chunk]) -> list[Scores]:
        scores: list[Scores] = []

        def done(_: Chunk, judged: Scores) -> None:
            scores.append(judged)
            self.hooks.progress("evaluating", len(scores), len(chunks))

        self.judge(self.snapshot, chunks, done)
        return scores

    def checkpoint_files(self) -> dict[str, bytes]:
        return self.learner.state_files()

    def vitals(self) -> Vitals:
        return Vitals(self.snapshot.version, self.buffer.in_work, (0.0, 0))

    def closed(self, epoch: int) -> None:
        self.buffer.close(epoch)
