"""How many actors of each role, which share of the cluster each gets, and on which nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.nodes import Node, listed
from diffusion.failures import RunFailure
from learner.config import Config

ROLES = ("sampler", "reward", "learner")
NODE_ID = "ray.io/node-id"  # the label that Ray gives every node


class PlacementError(RunFailure, ValueError):
    """The cluster's resources do not fit what the configuration asks for."""


@dataclass(frozen=True)
class Wish:
    """What a config says of a role: how many actors, GPUs of each, labels of the nodes that they may use. What is None
    is found."""

    count: int | None = None
    gpus: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


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
        parts = [f"{self.cpus:g} CPU", f"{self.gpus:g} GPU" if self.gpus else ""]
        return ", ".join(filter(None, [*parts, f"labels {dict(self.labels)}" if self.labels else ""]))


@dataclass(frozen=True)
class Placement:
    """Samplers and reward actors are spread over the nodes; learner ranks are packed by their placement group
    (cluster/readiness.py)."""

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
    """Placement of a run on the cluster's nodes; without `learner`, of an evaluation.

    Raises:
        PlacementError: they do not fit.
    """
    if config.model.device == "cuda" and not any(node.gpus for node in nodes) and not config.run.autoscale:
        raise PlacementError("model.device: cuda was asked for, but the cluster has no GPU")
    if config.model.device == "cpu":
        nodes = [replace(node, gpus=0.0) for node in nodes]
    sampler, reward, ranks = config.sampler, config.reward, config.learner
    wishes = (
        Wish(sampler.actors, sampler.gpus, sampler.labels), Wish(reward.actors, reward.gpus, reward.labels),
        Wish(ranks.ranks, ranks.gpus, ranks.labels) if learner else Wish(0),
    )  # fmt: skip
    chunks_per_update = config.train.trajectories // sampler.chunk_size // config.train.updates_per_epoch
    return place(wishes, chunks_per_update, nodes, config.run.autoscale)


def place(
    wishes: Sequence[Wish], chunks_per_update: int, nodes: Sequence[Node], autoscale: bool = False
) -> Placement:  # fmt: skip
    """Of samplers, reward actors and learner ranks (0: no learner). Counts as wished, else from the nodes; CPUs are
    shared out evenly, in fractions if need be. Each learner rank takes a whole GPU, and samplers and scorers share the
    rest; if too few are left for that, all roles share all GPUs. With `autoscale` nodes may be missing: what is asked
    for is asked of Ray.

    Raises:
        PlacementError: no CPU at all, a role without a node, more GPUs asked for than there are or one and a part,
            actors that fit on no single nodes, or a number of ranks among which an update's chunks cannot be divided.
    """
    usable = [[node for node in nodes if node.matches(wish.labels)] for wish in wishes]
    used = [node for node in nodes if any(node in theirs for theirs in usable)]
    cpus, gpus = sum(node.cpus for node in used), sum(int(node.gpus) for node in used)
    if not autoscale:
        if not any(node.cpus > 0 for node in nodes):
            raise PlacementError("the Ray cluster has no CPUs to give")
        for role, wish, theirs in zip(ROLES, wishes, usable, strict=True):
            if not theirs:
                raise PlacementError(f"{role}.labels: no node has {dict(wish.labels)}; the cluster has {listed(nodes)}")
    units = gpus or int(cpus)
    room = [sum(int(node.gpus) for node in theirs) or int(sum(node.cpus for node in theirs)) for theirs in usable]
    samplers, scorers, ranks = (wish.count for wish in wishes)
    if ranks is None:
        most = max(1, min(units // 2, room[2]))
        ranks = max(r for r in range(1, most + 1) if chunks_per_update % r == 0)
    if ranks and chunks_per_update % ranks:
        raise PlacementError(f"learner.ranks: {ranks} ranks cannot share {chunks_per_update} chunks an update evenly")
    samplers = samplers or max(1, min(units - ranks if gpus else units // 2, room[0]))
    counts = (samplers, scorers or max(1, samplers // 2), ranks)
    asked = [
        0.0 if wish.gpus is None and theirs and not any(node.gpus for node in theirs) else wish.gpus
        for wish, theirs in zip(wishes, usable, strict=True)
    ]
    each = _gpus(counts, asked, gpus)
    _check_gpus(counts, each, math.inf if autoscale else gpus)
    shares = [
        Share(count, 0.0, share, wish.labels, () if share else _last(theirs))
        for count, share, wish, theirs in zip(counts, each, wishes, usable, strict=True)
    ]
    cpu = _share(cpus, sum(counts)) if autoscale else _fitting_cpu(shares, nodes, cpus)
    sampler, scorer, rank = (replace(share, cpus=cpu) for share in shares)
    return Placement(sampler, scorer, rank, tuple(nodes))


def counts_now(config: Config, placement: Placement, nodes: Sequence[Node]) -> tuple[int, int]:
    """Samplers and reward actors that a run placed by `placement` should have on the nodes that are alive now.

    Those that the config counts stay if they fit; the others grow and shrink with what the learner ranks leave of the
    nodes that they may use, each with the share that it had at the start. What does not fit is left out, lest one role
    take the other's room: at least one of each.
    """
    ranks = placement.ranks
    before, after = (_left([ranks], there) or [_Free(node) for node in there] for there in (placement.nodes, nodes))

    def grown(share: Share) -> float:
        """Its count by the change of the room for its kind."""
        old, new = (sum(free.room(share) for free in there) for there in (before, after))
        return share.count * new / old if old > 0 else share.count

    samplers = config.sampler.actors or max(1, math.ceil(grown(placement.samplers) - 1e-6))
    scorers = config.reward.actors or max(1, math.floor(grown(placement.scorers) + 1e-6))

    def fit() -> bool:
        wanted = [ranks, replace(placement.samplers, count=samplers), replace(placement.scorers, count=scorers)]
        return _left(wanted, nodes) is not None

    while (samplers > 1 or scorers > 1) and not fit():
        if samplers > 1 and samplers >= scorers:
            samplers -= 1
        else:
            scorers -= 1
    return samplers, scorers


def _last(nodes: Sequence[Node]) -> tuple[str, ...]:
    """Nodes that actors without a GPU leave to those with one, where there are others."""
    with_gpus = tuple(node.id for node in nodes if node.gpus)
    return with_gpus if len(with_gpus) < len(nodes) else ()


def _check_gpus(counts: Sequence[int], each: Sequence[float], gpus: float) -> None:
    asked = sum(count * share for count, share in zip(counts, each, strict=True))
    if asked > gpus + 1e-6:
        terms = " + ".join(f"{count} x {share:g}" for count, share in zip(counts, each, strict=True))
        raise PlacementError(
            f"sampler.gpus, reward.gpus, learner.gpus: {terms} = {asked:g} GPUs asked for, the cluster has {gpus:g}"
            + ("" if gpus else " (or model.device is cpu)")
        )
    for role, share in zip(ROLES, each, strict=True):
        if share > 1 and share != int(share):
            raise PlacementError(f"{role}.gpus: {share:g} is neither a whole number of GPUs nor a part of one")


def _gpus(counts: tuple[int, int, int], asked: Sequence[float | None], gpus: int) -> list[float]:
    """GPUs of an actor of each role: what was asked for, and fair shares of what that leaves."""
    shares, ranks = list(asked), counts[2]
    left = gpus - sum(count * (share or 0.0) for count, share in zip(counts, asked, strict=True))
    others_open = asked[0] is None or asked[1] is None
    if shares[2] is None and (left > ranks or (left == ranks and not others_open)):
        shares[2], left = 1.0, left - ranks
    sharing = sum(count for count, share in zip(counts, shares, strict=True) if share is None)
    fair = _share(left, sharing) if sharing and left > 0 else 0.0
    return [fair if share is None else share for share in shares]


def _share(amount: float, among: int) -> float:
    """What each of `among` actors gets of `amount` devices: a whole one, or 1/k of one so that k of them fill a
    device exactly (a fraction never spans two devices)."""
    if among <= amount:
        return 1.0
    return _part(math.ceil(among / amount)) if amount else _part(among)


def _part(k: int) -> float:
    return math.floor(10_000 / k) / 10_000


def _fitting_cpu(shares: Sequence[Share], nodes: Sequence[Node], cpus: float) -> float:
    """The largest share of a CPU, 1/k of one, with which every actor fits on a node that it may use.

    Raises:
        PlacementError: none does.
    """
    total = sum(share.count for share in shares)
    fewest = max(1, math.ceil(total / cpus)) if cpus else 1
    for k in range(fewest, fewest + 4 * total):
        if _left([replace(share, cpus=_part(k)) for share in shares], nodes) is not None:
            return _part(k)
    wanted = ", ".join(
        f"{role} {share.count} x {share.gpus:g} GPU" + (f" where {dict(share.labels)}" if share.labels else "")
        for role, share in zip(ROLES, shares, strict=True)
    )
    raise PlacementError(
        f"sampler.actors, reward.actors, learner.ranks: {wanted} do not fit on single nodes; the cluster has "
        f"{listed(nodes)}; set fewer, or other gpus or labels"
    )


class _Free:
    """What is left of a node while actors are put onto it; a part of a GPU is a part of one device."""

    def __init__(self, node: Node) -> None:
        self.node, self.cpus, self.devices = node, node.cpus, [1.0] * int(node.gpus)

    def room(self, share: Share) -> float:
        if not self.node.matches(share.labels):
            return 0.0
        return sum(self.devices) if share.gpus else self.cpus

    def take(self, share: Share) -> bool:
        """Put one actor here, if it fits."""
        whole = share.gpus >= 1
        fitting = [i for i, free in enumerate(self.devices) if free > (1.0 if whole else share.gpus) - 1e-9]
        wanted = int(share.gpus) if whole else int(share.gpus > 0)
        if not self.node.matches(share.labels) or self.cpus < share.cpus - 1e-9 or len(fitting) < wanted:
            return False
        self.cpus -= share.cpus
        for i in sorted(fitting, key=self.devices.__getitem__)[:wanted]:
            self.devices[i] -= min(1.0, share.gpus)
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
