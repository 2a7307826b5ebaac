"""What a run tells Prometheus, through Ray's metrics agents: `ray_tributary_...`, counters with `_total` behind.
The driver alone exports. Ray sends every 10 s, and forgets a gauge that was not set for 20 s, so all of them are set
again every second. `cluster/deploy/grafana.json` shows them."""

import time
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from learner.protocol.runner import EpochResult, Vitals

SECONDS = 1.0  # between two settings of the gauges
CHUNK_SECONDS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
METRICS: dict[str, tuple[Any, ...]] = {  # by name: kind, meaning, tags beside the run
    "policy_version": (Gauge, "Newest published version of the policy"),
    "epochs_in_work": (Gauge, "Epochs begun to be sampled and not closed yet"),
    "staleness_mean": (Gauge, "Versions that the last trained chunks were behind, mean"),
    "staleness_max": (Gauge, "Versions that the last trained chunks were behind, maximum"),
    "actors": (Gauge, "Actors alive", "role"),
    "chunks": (Gauge, "Chunks that wait for an actor, or that actors have", "role", "state"),
    "reward_mean": (Gauge, "Mean raw terminal reward of the epoch trained last"),
    "train_seconds": (Gauge, "Seconds that the learner took for the epoch trained last"),
    "trajectories": (Counter, "Trajectories sampled, scored, trained", "stage"),
    "chunk_seconds": (partial(Histogram, boundaries=CHUNK_SECONDS), "Seconds that an actor took for a chunk", "role"),
    "receipts": (Counter, "Adapters as samplers had them, verified", "outcome"),
    "lost_chunks": (Counter, "Chunks to be made again, by whom they were lost with", "where"),
    "failures": (Counter, "Failures survived, by the error's class", "role", "error"),
}


class Metrics:
    """Of one run, tagged with its name. Nothing here waits for anything."""

    def __init__(self, run: str) -> None:
        self._metrics: dict[str, Any] = {}
        for name, (kind, meaning, *tags) in METRICS.items():
            self._metrics[name] = kind(f"tributary_{name}", description=meaning, tag_keys=("run", *tags))
            self._metrics[name].set_default_tags({"run": run})
        self._last_epoch: dict[str, float] = {}
        self._due = 0.0

    def record(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge, add to a counter, or put a value into a histogram."""
        metric = self._metrics[name]
        {Gauge: Gauge.set, Counter: Counter.inc, Histogram: Histogram.observe}[type(metric)](metric, value, tags)

    def turn(self, vitals: Callable[[], Vitals]) -> None:
        if time.monotonic() >= self._due:
            self.show(vitals())

    def show(self, vitals: Vitals) -> None:
        """Set every gauge."""
        self._due = time.monotonic() + SECONDS
        values = {"policy_version": vitals.policy_version, "epochs_in_work": vitals.epochs_in_work}
        behind = dict(zip(("staleness_mean", "staleness_max"), vitals.staleness, strict=True))
        for name, value in {**values, **behind, **self._last_epoch}.items():
            self.record(name, value)
        for role, count in vitals.actors.items():
            self.record("actors", count, role=role)
        for state, chunks in (("waiting", vitals.waiting), ("running", vitals.running)):
            for role, count in chunks.items():
                self.record("chunks", count, role=role, state=state)

    def trained(self, result: EpochResult) -> None:
        self.record("trajectories", len(result.rewards), stage="trained")
        self._last_epoch = {"reward_mean": fmean(result.rewards), "train_seconds": result.train_seconds}
