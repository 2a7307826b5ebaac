"""What a run tells Prometheus, through Ray's metrics agents: `ray_tributary_...`, counters with `_total` behind.

The driver alone exports. Ray sends every 10 s, and forgets a gauge that was not set for 20 s, so all of them are set
again every second. `cluster/deploy/grafana.json` shows them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from diffusion.trajectory import Receipt, Verdict
from learner.protocol.receipts import StaleWeights
from learner.protocol.runner import EpochResult, Vitals

SECONDS = 1.0  # between two settings of the gauges
CHUNK_SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]


class Metrics:
    """The metrics of one run, tagged with its name. Nothing here waits for anything."""

    def __init__(self, run: str) -> None:
        def new(kind: Any, name: str, meaning: str, *tags: str, **options: Any) -> Any:
            made = kind(f"tributary_{name}", description=meaning, tag_keys=("run", *tags), **options)
            return made.set_default_tags({"run": run})

        self.policy_version = new(Gauge, "policy_version", "Newest published version of the policy")
        self.epochs_in_work = new(Gauge, "epochs_in_work", "Epochs begun to be sampled and not closed yet")
        self.staleness_mean = new(Gauge, "staleness_mean", "Versions that the last trained chunks were behind, mean")
        self.staleness_max = new(Gauge, "staleness_max", "Versions that the last trained chunks were behind, maximum")
        self.actors = new(Gauge, "actors", "Actors alive", "role")
        self.chunks = new(Gauge, "chunks", "Chunks that wait for an actor, or that actors have", "role", "state")
        self.reward_mean = new(Gauge, "reward_mean", "Mean raw terminal reward of the epoch trained last")
        self.train_seconds = new(Gauge, "train_seconds", "Seconds that the learner took for the epoch trained last")
        self.trajectories = new(Counter, "trajectories", "Trajectories sampled, scored, trained", "stage")
        self.chunk_seconds = new(
            Histogram, "chunk_seconds", "Seconds that an actor took for a chunk", "role", boundaries=CHUNK_SECONDS
        )
        self.receipts = new(Counter, "receipts", "Adapters as samplers had them: verified or failed", "outcome")
        self.lost_chunks = new(Counter, "lost_chunks", "Chunks to be made again, by whom they were lost with", "where")
        self.failures = new(Counter, "failures", "Failures, survived or not, by the error's class", "role", "error")
        self._last_epoch: tuple[float, float] | None = None
        self._due = 0.0

    def turn(self, vitals: Callable[[], Vitals]) -> None:
        """Set every gauge, if it is time to."""
        if time.monotonic() >= self._due:
            self.show(vitals())

    def show(self, vitals: Vitals) -> None:
        """Set every gauge now."""
        self._due = time.monotonic() + SECONDS
        self.policy_version.set(vitals.policy_version)
        self.epochs_in_work.set(vitals.epochs_in_work)
        self.staleness_mean.set(vitals.staleness[0])
        self.staleness_max.set(vitals.staleness[1])
        for role, count in vitals.actors.items():
            self.actors.set(count, {"role": role})
        for state, chunks in (("waiting", vitals.waiting), ("running", vitals.running)):
            for role, count in chunks.items():
                self.chunks.set(count, {"role": role, "state": state})
        if self._last_epoch is not None:
            self.reward_mean.set(self._last_epoch[0])
            self.train_seconds.set(self._last_epoch[1])

    @contextmanager
    def sampled(self, receipt: Receipt) -> Iterator[None]:
        """A sampler's chunk has come; within, its receipt is checked."""
        try:
            yield
        except StaleWeights as error:
            self.receipts.inc(1, {"outcome": "failed"})
            self.failed("sampler", error)
            raise
        self.receipts.inc(1, {"outcome": "verified"})
        self.trajectories.inc(len(receipt.log_pf_sum), {"stage": "sampled"})
        self.chunk_seconds.observe(receipt.seconds, {"role": "sampler"})

    def scored(self, verdict: Verdict) -> None:
        self.trajectories.inc(len(verdict.rewards), {"stage": "scored"})
        self.chunk_seconds.observe(verdict.seconds, {"role": "scorer"})

    def trained(self, result: EpochResult) -> None:
        self.trajectories.inc(len(result.rewards), {"stage": "trained"})
        self._last_epoch = fmean(result.rewards), result.train_seconds

    def lost(self, where: str) -> None:
        """A chunk has to be made again. It was with a sampler or a scorer, or in the object store."""
        self.lost_chunks.inc(1, {"where": where})

    def failed(self, role: str, error: Exception) -> None:
        self.failures.inc(1, {"role": role, "error": type(error).__name__})
