"""How many actors of each role, which share of the cluster each gets, and on which nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.nodes import Node, listed
from diffusion.failures import RunFailure
from learner.config import Config

ROLES = ("sampler", "reward", "learner")
NODE_ID = "ray.io/node-id"  # the label that Ray gives every node
NO_LABELS: Mapping[str, str] = {}
Three = tuple[float | None, float | None, float | None]


class PlacementError(RunFailure, ValueError):
    """The cluster's resources do not fit what the configuration asks for."""


@dataclass(frozen=True)
class Placement:
    """Counts of the three roles, and Ray's options for an actor of each. Samplers and reward actors are spread over the
    nodes; learner ranks are packed by their placement group (cluster/readiness.py), which `rank_labels` go to."""

    samplers: int
    scorers: int
    ranks: int
    sampler_options: dict[str, Any]
    scorer_options: dict[str, Any]
    rank_options: dict[str, Any]
    rank_labels: Mapping[str, str] = field(default_factory=dict)
    nodes: tuple[Node, ...] = ()  # that it was made for

    def describe(self) -> str:
        """In words; without learner ranks where there are none."""
        roles = ((self.samplers, "sampler"), (self.scorers, "scorer"), (self.ranks, "learner rank"))
        return ", ".join(counted(number, role) for number, role in roles if number or role == "sampler")


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class _Need:
    """`count` actors that are alike."""

    count: int
    cpus: float
    gpus: float
    labels: Mapping[str, str]


def place_for(config: Config, nodes: Sequence[Node]) -> Placement:
    """Placement of a run on the cluster's nodes.

    Raises:
        PlacementError: they do not fit.
    """
    chunks_per_update = config.train.trajectories // config.sampler.chunk_size // config.train.updates_per_epoch
    if config.model.device == "cuda" and not any(node.gpus for node in nodes) and not config.run.autoscale:
        raise PlacementError("model.device: cuda was asked for, but the cluster has no GPU")
    if config.model.device == "cpu":
        nodes = [replace(node, gpus=0.0) for node in nodes]
    return place(
        config.sampler.actors, config.reward.actors, config.learner.ranks, chunks_per_update, nodes,
        (config.sampler.gpus, config.reward.gpus, config.learner.gpus),
        (config.sampler.labels, config.reward.labels, config.learner.labels), config.run.autoscale,
    )  # fmt: skip


def place(
    samplers: int | None, scorers: int | None, ranks: int | None, chunks_per_update: int, nodes: Sequence[Node],
    gpus_each: Three = (None, None, None), labels: Sequence[Mapping[str, str]] = (NO_LABELS, NO_LABELS, NO_LABELS),
    autoscale: bool = False,
) -> Placement:  # fmt: skip
    """Counts as given, else from the nodes; CPUs are shared out evenly, in fractions if need be.

    `gpus_each` are the GPUs of a sampler, a scorer and a rank where the config says so, `labels` the nodes that each
    may use. `ranks` 0: no learner. Otherwise each learner rank takes a whole GPU and samplers and scorers share the
    rest; if too few are left for that, all roles share all GPUs. With `autoscale` nodes may be missing: what is asked
    for is asked of Ray.

    Raises:
        PlacementError: no CPU at all, a role without a node, more GPUs asked for than there are or one and a part,
            actors that fit on no single nodes, or a number of ranks among which an update's chunks cannot be divided.
    """
    places = [[node for node in nodes if node.matches(selector)] for selector in labels]
    used = [node for node in nodes if any(node in found for found in places)]
    cpus, gpus = sum(node.cpus for node in used), sum(int(node.gpus) for node in used)
    if not autoscale:
        if not any(node.cpus > 0 for node in nodes):
            raise PlacementError("the Ray cluster has no CPUs to give")
        for role, selector, found in zip(ROLES, labels, places, strict=True):
            if not found:
                raise PlacementError(f"{role}.labels: no node has {dict(selector)}; the cluster has {listed(nodes)}")
    units = gpus or int(cpus)
    room = [sum(int(node.gpus) for node in found) or int(sum(node.cpus for node in found)) for found in places]
    most = max(1, min(units // 2, room[2]))
    if ranks is None:
        ranks = max(r for r in range(1, most + 1) if chunks_per_update % r == 0)
    samplers = samplers or max(1, min(units - ranks if gpus else units // 2, room[0]))
    scorers = scorers or max(1, samplers // 2)
    if ranks and chunks_per_update % ranks:
        raise PlacementError(f"learner.ranks: {ranks} ranks cannot share {chunks_per_update} chunks an update evenly")
    counts = (samplers, scorers, ranks)
    asked = [
        0.0 if share is None and found and not any(node.gpus for node in found) else share
        for share, found in zip(gpus_each, places, strict=True)
    ]
    each = _gpus(counts, asked, gpus)
    _check_gpus(counts, each, math.inf if autoscale else gpus)
    cpu = _share(cpus, sum(counts)) if autoscale else _fitting_cpu(counts, each, labels, nodes, cpus)
    rank_options = _resources(cpu, each[2])
    return Placement(
        *counts, _spread(cpu, each[0], labels[0], nodes), _spread(cpu, each[1], labels[1], nodes), rank_options,
        labels[2], tuple(nodes),
    )  # fmt: skip


def counts_now(config: Config, placement: Placement, nodes: Sequence[Node]) -> tuple[int, int]:
    """Samplers and reward actors that a run placed by `placement` should have on the nodes that are alive now.

    Those that the config counts stay if they fit; the others grow and shrink with what the learner ranks leave of the
    nodes that they may use, each with the share that it had at the start. What does not fit is left out, lest one role
    take the other's room: at least one of each.
    """
    rank = _need(placement.ranks, placement.rank_options, placement.rank_labels)
    sampler = _need(1, placement.sampler_options, config.sampler.labels)
    scorer = _need(1, placement.scorer_options, config.reward.labels)
    before, after = (_left([rank], there) or [_Free(node) for node in there] for there in (placement.nodes, nodes))

    def grown(count: int, need: _Need) -> float:
        """`count` by the change of the room for its kind."""
        old, new = (sum(free.room(need) for free in there) for there in (before, after))
        return count * new / old if old > 0 else count

    samplers = config.sampler.actors or max(1, math.ceil(grown(placement.samplers, sampler) - 1e-6))
    scorers = config.reward.actors or max(1, math.floor(grown(placement.scorers, scorer) + 1e-6))
    while _left([rank, replace(sampler, count=samplers), replace(scorer, count=scorers)], nodes) is None:
        if samplers > 1 and samplers >= scorers:
            samplers -= 1
        elif scorers > 1:
            scorers -= 1
        else:
            break
    return samplers, scorers


def asks(options: Mapping[str, Any]) -> str:
    """What one actor asks for, for messages."""
    parts = [f"{options['num_cpus']:g} CPU"]
    parts += [f"{options['num_gpus']:g} GPU"] if options.get("num_gpus") else []
    labels = {key: value for key, value in options.get("label_selector", {}).items() if key != NODE_ID}
    return ", ".join(parts + ([f"labels {labels}"] if labels else []))


def _resources(cpus: float, gpus: float) -> dict[str, Any]:
    return {"num_cpus": cpus} | ({"num_gpus": gpus} if gpus else {})


def _spread(cpus: float, gpus: float, labels: Mapping[str, str], nodes: Iterable[Node]) -> dict[str, Any]:
    """Options of a sampler or a reward actor. One without a GPU goes to nodes without any while they have room: those
    with GPUs are named, so that nodes which join later are taken too."""
    options = _resources(cpus, gpus) | {"scheduling_strategy": "SPREAD", "max_restarts": 0}
    found = [node for node in nodes if node.matches(labels)]
    with_gpus = [node.id for node in found if node.gpus]
    if not gpus and 0 < len(with_gpus) < len(found):
        elsewhere = {**labels, NODE_ID: f"!in({','.join(with_gpus)})"}
        return options | {"label_selector": elsewhere, "fallback_strategy": [{"label_selector": dict(labels)}]}
    return options | ({"label_selector": dict(labels)} if labels else {})


def _check_gpus(counts: tuple[int, int, int], each: Sequence[float], gpus: float) -> None:
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


def _gpus(counts: tuple[int, int, int], asked: Sequence[float | None], gpus: int) -> tuple[float, float, float]:
    """GPUs of an actor of each role: what was asked for, and fair shares of what that leaves."""
    given = list(asked)
    left = gpus - sum(count * (share or 0.0) for count, share in zip(counts, asked, strict=True))
    ranks = counts[2]
    others_open = asked[0] is None or asked[1] is None
    if given[2] is None and (left > ranks or (left == ranks and not others_open)):
        given[2], left = 1.0, left - ranks
    sharing = sum(count for count, share in zip(counts, given, strict=True) if share is None)
    fair = _share(left, sharing) if sharing and left > 0 else 0.0
    sampler, scorer, rank = (fair if share is None else share for share in given)
    return sampler, scorer, rank


def _share(amount: float, among: int) -> float:
    """What each of `among` actors gets of `amount` devices: a whole one, or 1/k of one so that k of them fill a
    device exactly (a fraction never spans two devices)."""
    if among <= amount:
        return 1.0
    return _part(math.ceil(among / amount)) if amount else _part(among)


def _part(k: int) -> float:
    return math.floor(10_000 / k) / 10_000


def _fitting_cpu(
    counts: tuple[int, int, int], gpus_each: Sequence[float], labels: Sequence[Mapping[str, str]],
    nodes: Sequence[Node], cpus: float,
) -> float:  # fmt: skip
    """The largest share of a CPU, 1/k of one, with which every actor fits on a node that it may use.

    Raises:
        PlacementError: none does.
    """
    total = sum(counts)
    fewest = max(1, math.ceil(total / cpus)) if cpus else 1
    for k in range(fewest, fewest + 4 * total):
        kinds = zip(counts, gpus_each, labels, strict=True)
        if _left([_Need(count, _part(k), share, selector) for count, share, selector in kinds], nodes) is not None:
            return _part(k)
    wanted = ", ".join(
        f"{role} {count} x {share:g} GPU" + (f" where {dict(selector)}" if selector else "")
        for role, count, share, selector in zip(ROLES, counts, gpus_each, labels, strict=True)
    )
    raise PlacementError(
        f"sampler.actors, reward.actors, learner.ranks: {wanted} do not fit on single nodes; the cluster has "
        f"{listed(nodes)}; set fewer, or other gpus or labels"
    )


class _Free:
    """What is left of a node while actors are put onto it; a part of a GPU is a part of one device."""

    def __init__(self, node: Node) -> None:
        self.node, self.cpus, self.devices = node, node.cpus, [1.0] * int(node.gpus)

    def room(self, need: _Need) -> float:
        if not self.node.matches(need.labels):
            return 0.0
        return sum(self.devices) if need.gpus else self.cpus

    def take(self, need: _Need) -> bool:
        """Put one actor here, if it fits."""
        whole = need.gpus >= 1
        fitting = [i for i, free in enumerate(self.devices) if free > (1.0 if whole else need.gpus) - 1e-9]
        wanted = int(need.gpus) if whole else int(need.gpus > 0)
        if not self.node.matches(need.labels) or self.cpus < need.cpus - 1e-9 or len(fitting) < wanted:
            return False
        self.cpus -= need.cpus
        for i in sorted(fitting, key=self.devices.__getitem__)[:wanted]:
            self.devices[i] -= min(1.0, need.gpus)
        return True


def _left(needs: Sequence[_Need], nodes: Sequence[Node]) -> list[_Free] | None:
    """What is free on the nodes with all actors on them, or None if they do not fit: those with the fewest nodes to go
    to first, each onto the fullest one that takes it."""
    free = [_Free(node) for node in nodes]
    for need in sorted(needs, key=lambda need: (sum(node.matches(need.labels) for node in nodes), -need.gpus)):
        for _ in range(need.count):
            fullest = sorted(free, key=lambda one: (sum(one.devices), one.cpus))
            if not any(one.take(need) for one in fullest):
                return None
    return free


def _need(count: int, options: Mapping[str, Any], labels: Mapping[str, str]) -> _Need:
    return _Need(count, options["num_cpus"], options.get("num_gpus", 0.0), labels)
