"""Getting the actors of a run up: room for the learner ranks, and a deadline that says what is asked and is there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.nodes import alive_nodes, listed
from cluster.placement import Placement, Share
from cluster.waits import DeadlineExceeded, done, get


@dataclass(frozen=True)
class Asked:
    """Calls to actors of one role (`samplers`) that were just started with this share each."""

    role: str
    share: Share
    refs: list[ray.ObjectRef]


def reserve(placement: Placement, seconds: float) -> PlacementGroup:
    """Room for the learner ranks, on as few nodes as hold them; to be given back by `ray.util.remove_placement_group`.

    Raises:
        DeadlineExceeded: there is none within `seconds` (run.ready_seconds).
    """
    ranks = placement.ranks
    bundle = {"CPU": ranks.cpus} | ({"GPU": ranks.gpus} if ranks.gpus else {})
    selectors = [dict(ranks.labels)] * ranks.count if ranks.labels else None
    group = placement_group([bundle] * ranks.count, strategy="PACK", bundle_label_selector=selectors)
    if not group.wait(seconds):
        ray.util.remove_placement_group(group)
        raise _late(seconds, f"room for {ranks.count} learner ranks ({ranks} each)")
    return group


def in_group(placement: Placement, group: PlacementGroup) -> list[dict[str, Any]]:
    """Ray's options for each learner rank in its place."""
    places = [PlacementGroupSchedulingStrategy(group, rank) for rank in range(placement.ranks.count)]
    return [{**placement.ranks.resources, "max_restarts": 0, "scheduling_strategy": place} for place in places]


def ready(asked: Sequence[Asked], deadline: float, limit: float) -> list[list[Any]]:
    """The answers of all, role by role. `deadline` is of time.monotonic; `limit` is run.ready_seconds.

    Raises:
        DeadlineExceeded: not all had answered; says who is missing, what each asks for, and what the cluster has.
        ActorDied: an actor could not start; the message has its error.
    """
    what = "starting " + ", ".join(f"{len(calls.refs)} {calls.role}" for calls in asked)
    refs = [ref for calls in asked for ref in calls.refs]
    try:
        answers = iter(get(refs, max(0.0, deadline - time.monotonic()), what, f"run.ready_seconds={limit:g}"))
    except DeadlineExceeded:
        missing = ((calls, len(calls.refs) - len(done(calls.refs))) for calls in asked)
        texts = [f"{n} of {len(calls.refs)} {calls.role} ({calls.share} each)" for calls, n in missing if n]
        raise _late(limit, " and ".join(texts)) from None
    return [[next(answers) for _ in calls.refs] for calls in asked]


def _late(seconds: float, waiting_for: str) -> DeadlineExceeded:
    there = listed(alive_nodes())
    return DeadlineExceeded(f"run.ready_seconds={seconds:g}: still waiting for {waiting_for}; the cluster has {there}")
