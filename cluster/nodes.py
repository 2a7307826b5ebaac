"""The nodes of the cluster: what they have, what is free, and which of them a label selector means."""

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.autoscaler.v2.sdk import get_cluster_status

from diffusion.failures import DeadlineExceeded

ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs in all, and those that no actor has; labels as given, and Ray's own (`ray.io/...`)."""

    address: str
    cpus: float
    gpus: float = 0.0
    free_cpus: float = 0.0
    free_gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    id: str = ""

    def matches(self, selector: Mapping[str, str]) -> bool:
        """Whether Ray would place an actor here whose label selector has x, !x, in(x,y) or !in(x,y) by label. A label
        that is not there is unlike any value."""
        for label, wanted in selector.items():
            values = wanted.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
            if (self.labels.get(label) in values) == wanted.startswith("!"):
                return False
        return True

    def __str__(self) -> str:
        labels = {key: value for key, value in self.labels.items() if key != "ray.io/node-id"}
        cpus, gpus = f"{self.cpus:g} CPU ({self.free_cpus:g} free)", f"{self.gpus:g} GPU ({self.free_gpus:g} free)"
        return f"node {self.address}: {cpus}, {gpus}, {f'labels {labels}' if labels else 'no labels'}"


def alive_nodes(seconds: float = ANSWER_SECONDS) -> list[Node]:
    """The nodes that Ray, which must be initialised, holds to be alive: a few milliseconds. Raises DeadlineExceeded if
    Ray's control store is gone or does not answer within `seconds`."""
    address = ray.get_runtime_context().gcs_address
    answers: list[Any] = []

    def ask() -> None:
        end = time.monotonic() + seconds
        while not answers and time.monotonic() < end:
            with contextlib.suppress(ray.exceptions.RayError):  # it is gone, or slow; no traceback of this thread
                answers.append(get_cluster_status(address))
            time.sleep(0 if answers else 0.1)

    # Of its own deadlines none is kept: 30 s when the store is gone.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        raise DeadlineExceeded(f"the Ray cluster's control store at {address} did not answer within {seconds:g} s")
    nodes = []
    for info in [*answers[0].active_nodes, *answers[0].idle_nodes]:
        has, free, labels = info.total_resources(), info.available_resources(), info.labels or {}
        cpus, gpus, free_cpus, free_gpus = (each.get(kind, 0.0) for each in (has, free) for kind in ("CPU", "GPU"))
        nodes.append(Node(info.ip_address, cpus, gpus, free_cpus, free_gpus, labels, info.node_id))
    return sorted(nodes, key=lambda node: (node.address, node.id))


def listed(nodes: Sequence[Node]) -> str:
    return "; ".join(map(str, nodes)) or "no nodes"


def totals(nodes: Sequence[Node]) -> dict[str, float]:
    """CPUs and GPUs of all of them, where there are any."""
    amounts = {"CPU": sum(node.cpus for node in nodes), "GPU": sum(node.gpus for node in nodes)}
    return {name: amount for name, amount in amounts.items() if amount}
