"""How many actors of each role, what share of the cluster each gets, and where; and the deadline of their start."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.nodes import Node, alive_nodes, listed
from cluster.waits import done, get
from diffusion.failures import DeadlineExceeded, RunFailure
from learner.config import Config

ROLES = ("sampler", "reward", "learner")
Progress = Callable[[int, int], None]  # hears how many are done, of how many
LOOK_SECONDS = 0.5  # between two looks at who is up
# While waiting for a cluster its head is asked for a sign of life: where it is gone for 60 s, Ray ends our process.
PROBE_SECONDS, LOST_SECONDS = 5.0, 30.0
NODE_ID = "ray.io/node-id"  # the label that Ray gives every node


class PlacementError(RunFailure, ValueError):
    """The cluster's resources do not fit what the configuration asks for."""


@dataclass(frozen=True)
class Share:
    """`count` actors that are alike, and what Ray is asked for each of them; as text, for messages."""

    count: int
    cpus: float = 0.0
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    last: tuple[str, ...] = ()  # ids of nodes to be used when the others have no room left

    @property
    def resources(self) -> dict[str, float]:
        return {"num_cpus": self.cpus} | ({"num_gpus": self.gpus} if self.gpus else {})

    @property
    def spread(self) -> dict[str, Any]:
        """Ray's options for actors that are spread over the nodes."""
        options = self.resources | {"scheduling_strategy": "SPREAD", "max_restarts": 0}
        if self.last:  # they are named, so that nodes which join later are taken before them too
            first = {**self.labels, NODE_ID: f"!in({','.join(self.last)})"}
            return options | {"label_selector": first, "fallback_strategy": [{"label_selector": dict(self.labels)}]}
        return options | ({"label_selector": dict(self.labels)} if self.labels else {})

    def __str__(self) -> str:
        amounts = [f"{amount:g} {kind}" for amount, kind in ((self.cpus, "CPU"), (self.gpus, "GPU")) if amount]
        return ", ".join([*amounts, f"labels {dict(self.labels)}"] if self.labels else amounts)


@dataclass(frozen=True)
class Placement:
    """Samplers and reward actors are spread over the nodes; learner ranks are packed by their placement group."""

    samplers: Share
    scorers: Share
    ranks: Share
    nodes: tuple[Node, ...] = ()  # that it was made for

    def describe(self) -> str:
        """In words; without learner ranks where there are none."""
        roles = ((self.samplers, "sampler"), (self.scorers, "scorer"), (self.ranks, "learner rank"))
        return ", ".join(counted(share.count, role) for share, role in roles if share.count)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def place_for(config: Config, nodes: Sequence[Node], learner: bool = True) -> Placement:
    """Placement of a run on the cluster's nodes; without `learner`, of an evaluation. Counts that the config leaves out
    come from the nodes; CPUs are shared out evenly, in fractions if need be. Each learner rank takes a whole GPU, and
    samplers and scorers share the rest; if too few are left for that, all roles share all GPUs. With run.autoscale
    nodes may be missing: what is asked for is asked of Ray. Raises a PlacementError where that cannot be."""
    autoscale, device, trainer = config.run.autoscale, config.model.device, config.learner
    if not learner:
        trainer = trainer.model_copy(update={"ranks": 0, "gpus": None, "labels": {}})
    roles: tuple[Any, ...] = (config.sampler, config.reward, trainer)
    if device == "cpu":
        nodes = [replace(node, gpus=0.0) for node in nodes]
    usable = [[node for node in nodes if node.matches(role.labels)] for role in roles]
    used = [node for node in nodes if any(node in theirs for theirs in usable)]
    if not autoscale:
        if device == "cuda" and not any(node.gpus for node in nodes):
            raise PlacementError("model.device: cuda was asked for, but the cluster has no GPU")
        if not any(node.cpus > 0 for node in nodes):
            raise PlacementError("the Ray cluster has no CPUs to give")
        for name, role, theirs in zip(ROLES, roles, usable, strict=True):
            if not theirs:
                raise PlacementError(f"{name}.labels: no node has {role.labels}; the cluster has {listed(nodes)}")
    cpus, gpus = sum(node.cpus for node in used), sum(int(node.gpus) for node in used)
    units = gpus or int(cpus)
    room = [sum(int(node.gpus) for node in theirs) or int(sum(node.cpus for node in theirs)) for theirs in usable]
    ranks = trainer.ranks
    if ranks is None:
        chunks_per_update = config.train.trajectories // config.sampler.chunk_size // config.train.updates_per_epoch
        most = max(1, min(units // 2, room[2]))
        ranks = max(r for r in range(1, most + 1) if chunks_per_update % r == 0)
    samplers = config.sampler.actors or max(1, min(units - ranks if gpus else units // 2, room[0]))
    counts = (samplers, config.reward.actors or max(1, samplers // 2), ranks)
    asked = [
        0.0 if role.gpus is None and theirs and not any(node.gpus for node in theirs) else role.gpus
        for role, theirs in zip(roles, usable, strict=True)
    ]
    shares = [
        Share(count, 0.0, gpu, role.labels, () if gpu else _last(theirs))
        for count, gpu, role, theirs in zip(counts, _gpus(counts, asked, gpus, autoscale), roles, usable, strict=True)
    ]
    sampler, scorer, rank = _with_cpus(shares, nodes, cpus, autoscale)
    return Placement(sampler, scorer, rank, tuple(nodes))


def counts_now(config: Config, placement: Placement, nodes: Sequence[Node]) -> tuple[int, int]:
    """Samplers and reward actors that a run placed by `placement` should have on the nodes that are alive now: at least
    one of each. Those that the config counts stay if they fit; the others grow and shrink with what the learner ranks
    leave of the nodes that they may use. What does not fit is left out, lest one role take the other's room."""
    ranks, roles = placement.ranks, (placement.samplers, placement.scorers)

    def grown(share: Share) -> float:
        """Its count by the change of the room for its kind."""
        rooms = (_left([ranks], there) or [_Free(node) for node in there] for there in (placement.nodes, nodes))
        may_use = ([free for free in room if free.node.matches(share.labels)] for room in rooms)
        old, new = (sum(sum(free.devices) if share.gpus else free.cpus for free in room) for room in may_use)
        return share.count * new / old if old > 0 else share.count

    samplers = config.sampler.actors or max(1, math.ceil(grown(placement.samplers) - 1e-6))
    counts = [samplers, config.reward.actors or max(1, math.floor(grown(placement.scorers) + 1e-6))]
    while max(counts) > 1:
        wanted = [replace(share, count=count) for share, count in zip(roles, counts, strict=True)]
        if _left([ranks, *wanted], nodes) is not None:
            break
        counts[counts.index(max(counts))] -= 1
    return counts[0], counts[1]


def reserve(placement: Placement, seconds: float) -> PlacementGroup:
    """Room for the learner ranks, on as few nodes as hold them; to be given back by `ray.util.remove_placement_group`.
    Raises DeadlineExceeded if there is none within `seconds` (run.ready_seconds), or the cluster's head is lost."""
    ranks = placement.ranks
    bundle = {"CPU": ranks.cpus} | ({"GPU": ranks.gpus} if ranks.gpus else {})
    selectors = [dict(ranks.labels)] * ranks.count if ranks.labels else None
    group = placement_group([bundle] * ranks.count, strategy="PACK", bundle_label_selector=selectors)
    there: list[bool] = []

    def wait() -> None:  # which, the head gone, keeps no deadline
        with contextlib.suppress(ray.exceptions.RayError):
            there.append(group.wait(seconds))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    waiting.join(PROBE_SECONDS)
    while waiting.is_alive():
        alive_nodes(LOST_SECONDS)
        waiting.join(PROBE_SECONDS)
    if there == [True]:
        return group
    ray.util.remove_placement_group(group)
    raise _late(seconds, f"room for {ranks.count} learner ranks ({ranks} each)")


def in_group(placement: Placement, group: PlacementGroup) -> list[dict[str, Any]]:
    """Ray's options for each learner rank in its place."""
    places = [PlacementGroupSchedulingStrategy(group, rank) for rank in range(placement.ranks.count)]
    return [{**placement.ranks.resources, "max_restarts": 0, "scheduling_strategy": place} for place in places]


def ready(
    calls: Mapping[str, tuple[Share, list[ray.ObjectRef]]],
    deadline: float,
    limit: float,
    progress: Progress = lambda done, total: None,
) -> list[Any]:
    """All answers of calls to actors that were just started: by role (`samplers`), each one's share and the calls.
    `deadline` is of time.monotonic; `limit` is run.ready_seconds; `progress` hears how many have answered, of how many.
    Raises DeadlineExceeded, which says who is missing, what each asks for, and what the cluster has, or that its head
    is lost, or ActorDied: an actor could not start, and why."""
    what = "starting " + ", ".join(f"{len(refs)} {role}" for role, (_, refs) in calls.items())
    everyone = [ref for _, refs in calls.values() for ref in refs]
    waiting, answers, asked = list(everyone), dict[ray.ObjectRef, Any](), time.monotonic()
    while waiting and (now := time.monotonic()) < deadline:
        progress(len(answers), len(everyone))
        for ref in done(waiting, LOOK_SECONDS, enough=1):
            waiting.remove(ref)
            answers[ref] = get(ref, limit, what, "run.ready_seconds")
        if now - asked > PROBE_SECONDS:
            alive_nodes(LOST_SECONDS)
            asked = now
    if waiting:
        missing = ((role, share, len(refs), len(refs) - len(done(refs))) for role, (share, refs) in calls.items())
        texts = [f"{n} of {count} {role} ({share} each)" for role, share, count, n in missing if n]
        raise _late(limit, " and ".join(texts))
    return [answers[ref] for ref in everyone]


def _late(seconds: float, waiting_for: str) -> DeadlineExceeded:
    there = listed(alive_nodes())
    return DeadlineExceeded(f"run.ready_seconds={seconds:g}: still waiting for {waiting_for}; the cluster has {there}")


def _last(nodes: Sequence[Node]) -> tuple[str, ...]:
    """Nodes that actors without a GPU leave to those with one, where there are others."""
    with_gpus = tuple(node.id for node in nodes if node.gpus)
    return with_gpus if len(with_gpus) < len(nodes) else ()


def _gpus(counts: Sequence[int], asked: Sequence[float | None], gpus: int, autoscale: bool) -> list[float]:
    """GPUs of an actor of each role: what was asked for, and fair shares of what that leaves."""
    shares, ranks = list(asked), counts[2]
    left = gpus - sum(count * (share or 0.0) for count, share in zip(counts, asked, strict=True))
    if shares[2] is None and (left > ranks or (left == ranks and None not in shares[:2])):
        shares[2], left = 1.0, left - ranks
    sharing = sum(count for count, share in zip(counts, shares, strict=True) if share is None)
    fair = _part(math.ceil(sharing / left)) if sharing and left > 0 else 0.0
    each = [fair if share is None else share for share in shares]
    total = sum(count * share for count, share in zip(counts, each, strict=True))
    if total > gpus + 1e-6 and not autoscale:
        terms = " + ".join(f"{count} x {share:g}" for count, share in zip(counts, each, strict=True))
        has = f"{gpus}" if gpus else "0 (or model.device is cpu)"
        asks = f"{terms} = {total:g} GPUs asked for, the cluster has {has}"
        raise PlacementError(f"sampler.gpus, reward.gpus, learner.gpus: {asks}")
    for role, share in zip(ROLES, each, strict=True):
        if share > 1 and share % 1:
            raise PlacementError(f"{role}.gpus: {share:g} is neither a whole number of GPUs nor a part of one")
    return each


def _part(k: int) -> float:
    """1/k of a device, so that k actors fill it exactly (a fraction never spans two devices)."""
    return math.floor(10_000 / k) / 10_000


def _with_cpus(shares: Sequence[Share], nodes: Sequence[Node], cpus: float, autoscale: bool) -> list[Share]:
    """With the largest part of a CPU, 1/k of one, with which every actor fits on a node that it may use."""
    total = sum(share.count for share in shares)
    fewest = max(1, math.ceil(total / cpus)) if cpus else total
    for k in range(fewest, fewest + 4 * total):
        placed = [replace(share, cpus=_part(k)) for share in shares]
        if autoscale or _left(placed, nodes) is not None:
            return placed
    wanted = [f"{share.count} x {share} ({role})" for role, share in zip(ROLES, shares, strict=True) if str(share)]
    raise PlacementError(
        f"sampler.actors, reward.actors, learner.ranks: {', '.join(wanted)} do not fit on single nodes; the cluster "
        f"has {listed(nodes)}; set fewer, or other gpus or labels"
    )


class _Free:
    """What is left of a node while actors are put onto it; a part of a GPU is a part of one device."""

    def __init__(self, node: Node) -> None:
        self.node, self.cpus, self.devices = node, node.cpus, [1.0] * int(node.gpus)

    def take(self, share: Share) -> bool:
        """Put one actor here, if it fits."""
        part, wanted = min(1.0, share.gpus), math.ceil(share.gpus)
        fitting = [i for i, free in enumerate(self.devices) if free > part - 1e-9]
        if not self.node.matches(share.labels) or self.cpus < share.cpus - 1e-9 or len(fitting) < wanted:
            return False
        self.cpus -= share.cpus
        for i in sorted(fitting, key=self.devices.__getitem__)[:wanted]:
            self.devices[i] -= part
        return True


def _left(shares: Sequence[Share], nodes: Sequence[Node]) -> list[_Free] | None:
    """What is free on the nodes with all actors on them, or None if they do not fit: those with the fewest nodes to go
    to first, each onto the fullest one that takes it."""
    free = [_Free(node) for node in nodes]
    for share in sorted(shares, key=lambda share: (sum(node.matches(share.labels) for node in nodes), -share.gpus)):
        for _ in range(share.count):
            fullest = sorted(free, key=lambda node: (sum(node.devices), node.cpus))
            if not any(node.take(share) for node in fullest):
                return None
    return free
