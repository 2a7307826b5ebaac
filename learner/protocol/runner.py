"""The contract between the epoch loop and whoever does the work, in process or on Ray."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isnan
from statistics import mean
from typing import Any, Protocol

from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, Scores
from learner.protocol.buffer import Account, ChunksOf
from learner.protocol.ledger import Ledger
from learner.protocol.quarantine import SetAside


@dataclass(frozen=True)
class Training:
    """What an epoch of training did."""

    metrics: dict[str, float]  # means over ranks and updates: see Learner.update; staleness and replay age
    updates: list[dict[str, float]]  # the same of each update
    trajectory_ids: tuple[int, ...]  # this rank's, in the order trained
    set_aside: tuple[SetAside, ...] = ()  # this rank's bad ones


@dataclass(frozen=True)
class EpochResult:
    """What comes back of an epoch. On Ray the seconds of sampling and scoring are what the learner waited for them."""

    accounts: Sequence[Account]  # in chunk order
    training: Training  # of rank 0: metrics are means over ranks
    set_aside: Sequence[SetAside]  # the bad trajectories, of all ranks
    sample_seconds: float
    score_seconds: float
    train_seconds: float

    @property
    def rewards(self) -> list[float]:
        """Raw terminal reward of each trajectory that is not bad."""
        return [reward for _, _, verdict in self.accounts for reward in verdict.rewards if not isnan(reward)]

    @property
    def reward_parts(self) -> dict[str, float]:
        """Of a weighted_sum: mean raw terminal score of each of its rewards."""
        return {label: mean(scores) for label, scores in self.parts[1].items()}

    @property
    def parts(self) -> tuple[list[str], dict[str, list[float]]]:
        """Of a weighted_sum: the prompt of each trajectory that is not bad, and its raw scores by label."""
        good = [
            (chunk.prompts[row], verdict.parts, row)
            for chunk, _, verdict in self.accounts
            for row in range(len(chunk.prompts))
            if row not in verdict.bad
        ]
        labels = self.accounts[0][2].parts
        return [prompt for prompt, *_ in good], {
            label: [parts[label][row] for _, parts, row in good] for label in labels
        }

    def rows(self, run_id: str, epoch: int, beta: float) -> list[dict[str, Any]]:
        """A row a trajectory, columns of records/run_folder.py's SCHEMA."""
        return [
            {
                "run_id": run_id,
                "epoch": epoch,
                "trajectory_id": number,
                "policy_version": receipt.policy_version,
                "adapter_sha256": receipt.adapter_sha256,
                "prompt": chunk.prompts[i],
                "metadata": json.dumps(chunk.metadata[i]) if chunk.metadata else None,
                "reward": None if i in verdict.bad else verdict.rewards[i],
                "reward_parts": [(label, values[i]) for label, values in verdict.parts.items()],
                "log_pf_sum": receipt.log_pf_sum[i],
                "log_pb_sum": receipt.log_pb_sum[i],
                "beta": beta,
                "thumbnail_png": (verdict.thumbnails[i] or None) if verdict.thumbnails else None,
                "sampler_node": receipt.node,
                "chunk": chunk.index,
                "sample_seconds": receipt.seconds,
                "score_seconds": verdict.seconds,
                "bad": verdict.bad.get(i),
            }
            for chunk, receipt, verdict in self.accounts
            for i, number in enumerate(chunk.trajectory_ids)
        ]


@dataclass(frozen=True)
class Vitals:
    """A run at a glance. Actors and chunks by role: sampler, scorer, learner."""

    policy_version: int
    epochs_in_work: int  # begun to be sampled and not closed yet
    staleness: tuple[float, int]  # mean and maximum over the chunks of the epoch trained last, in policy versions
    actors: dict[str, int] = field(default_factory=dict)  # alive
    waiting: dict[str, int] = field(default_factory=dict)  # chunks that no actor has yet
    running: dict[str, int] = field(default_factory=dict)  # chunks that actors have


@dataclass(frozen=True)
class Hooks:
    """What a runner tells the loop while it starts and works, and asks of it."""

    say: Callable[[str], None] = print  # faults survived, a line each
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    turn: Callable[[], None] = lambda: None  # again and again, whatever is waited for
    last_checkpoint: Callable[[], dict[str, bytes] | None] = lambda: None  # its files, for learners to start anew


class Runner(Protocol):
    """Made from a config, the files of a checkpoint to go on from, if there is one, and hooks. Then `begin`, and for
    each epoch `train_epoch`, `checkpoint_files` and, when they are written, `closed`."""

    snapshot: Snapshot  # the newest policy version, which the next chunks are sampled with
    description: str
    dimensions: int  # D, numbers in one latent
    ranks: int
    batch_sizes: dict[str, int]  # micro_batch: transitions; score: images. As given, or as free memory had it

    def begin(self, chunks_of: ChunksOf, epochs: range, ledger: Ledger) -> None: ...  # `epochs` are those left
    # With this beta and objective.reward_offset; and publish the next policy version.
    def train_epoch(self, epoch: int, beta: float, offset: float) -> EpochResult: ...
    def evaluate(self, chunks: Sequence[Chunk]) -> list[Scores]: ...  # under the newest version, with images
    def checkpoint_files(self) -> dict[str, bytes]: ...  # learner/state.py's, and under lora/ the adapter's
    def vitals(self) -> Vitals: ...  # just now; from `begin` on
    def closed(self, epoch: int) -> None: ...  # it is in a checkpoint: nothing of it is needed any more
    def close(self) -> None: ...  # stop everything that was started; safe to call twice
