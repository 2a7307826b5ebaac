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
from cluster.placement import Placement, asks
from cluster.waits import DeadlineExceeded, done, get


@dataclass(frozen=True)
class Asked:
    """Calls to actors of one role (`samplers`) that were just started with Ray's `options`."""

    role: str
    options: dict[str, Any]
    refs: list[ray.ObjectRef]


def reserve(placement: Placement, seconds: float) -> PlacementGroup:
    """Room for the learner ranks, on as few nodes as hold them; to be given back by `ray.util.remove_placement_group`.

    Raises:
        DeadlineExceeded: there is none within `seconds` (run.ready_seconds).
    """
    options, count = placement.rank_options, placement.ranks
    bundle = {"CPU": options["num_cpus"]} | ({"GPU": options["num_gpus"]} if "num_gpus" in options else {})
    selectors = [dict(placement.rank_labels)] * count if placement.rank_labels else None
    group = placement_group([bundle] * count, strategy="PACK", bundle_label_selector=selectors)
    if not group.wait(seconds):
        ray.util.remove_placement_group(group)
        wanted = {**options, "label_selector": placement.rank_labels}
        raise _late(seconds, f"room for {count} learner ranks ({asks(wanted)} each)")
    return group


def in_group(placement: Placement, group: PlacementGroup) -> list[dict[str, Any]]:
    """Ray's options for each learner rank in its place."""
    places = [PlacementGroupSchedulingStrategy(group, rank) for rank in range(placement.ranks)]
    return [{**placement.rank_options, "max_restarts": 0, "scheduling_strategy": place} for place in places]


def ready(asked: Sequence[Asked], deadline: float, limit: float) -> list[list[Any]]:
    """The answers of all, role by role. `deadline` is of time.monotonic; `limit` is run.ready_seconds.

    Raises:
        DeadlineExceeded: not all had answered; says who is missing, what each asks for, and what the cluster has.
        ActorDied: an actor could not start; the message has its error.
    """
    what = "starting " + ", ".join(f"{len(one.refs)} {one.role}" for one in asked)
    refs = [ref for one in asked for ref in one.refs]
    try:
        answers = iter(get(refs, max(0.0, deadline - time.monotonic()), what, f"run.ready_seconds={limit:g}"))
    except DeadlineExceeded:
        missing = ((one, len(one.refs) - len(done(one.refs))) for one in asked)
        texts = [f"{n} of {len(one.refs)} {one.role} ({asks(one.options)} each)" for one, n in missing if n]
        raise _late(limit, " and ".join(texts)) from None
    return [[next(answers) for _ in one.refs] for one in asked]


def _late(seconds: float, waiting_for: str) -> DeadlineExceeded:
    there = listed(alive_nodes())
    return DeadlineExceeded(f"run.ready_seconds={seconds:g}: still waiting for {waiting_for}; the cluster has {there}")
