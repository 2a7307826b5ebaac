"""How many actors of each role, and which share of the machine each gets."""

from __future__ import annotations

import math
from dataclasses import dataclass


class PlacementError(ValueError):
    """The cluster's resources do not fit what the configuration asks for."""


@dataclass(frozen=True)
class Placement:
    """Counts of the three roles, and Ray resource options for an actor of each."""

    samplers: int
    scorers: int
    ranks: int
    sampler_options: dict[str, float]
    scorer_options: dict[str, float]
    rank_options: dict[str, float]

    def describe(self) -> str:
        return f"{self.samplers} samplers, {self.scorers} scorers, {self.ranks} learner ranks"


def place(
    samplers: int | None, scorers: int | None, ranks: int | None, chunks_per_update: int, resources: dict[str, float]
) -> Placement:
    """Counts as given, else from the resources; CPUs are shared out evenly, in fractions if need be.

    With GPUs each learner rank takes a whole one and samplers and scorers share the rest; if too few are left
    for that, all roles share all GPUs.

    Raises:
        PlacementError: no CPU at all, or a number of ranks among which an update's chunks cannot be divided.
    """
    cpus, gpus = resources.get("CPU", 0.0), int(resources.get("GPU", 0.0))
    if cpus <= 0:
        raise PlacementError("the Ray cluster has no CPUs to give")
    units = gpus or int(cpus)
    ranks = ranks or max(r for r in range(1, max(1, units // 2) + 1) if chunks_per_update % r == 0)
    samplers = samplers or max(1, units - ranks if gpus else units // 2)
    scorers = scorers or max(1, samplers // 2)
    if chunks_per_update % ranks:
        raise PlacementError(f"learner.ranks: {ranks} ranks cannot share {chunks_per_update} chunks an update evenly")
    share = _share(cpus, samplers + scorers + ranks)
    cpu = {"num_cpus": share}
    if not gpus:
        return Placement(samplers, scorers, ranks, cpu, cpu, cpu)
    if gpus > ranks:
        rest = cpu | {"num_gpus": _share(gpus - ranks, samplers + scorers)}
        return Placement(samplers, scorers, ranks, rest, rest, cpu | {"num_gpus": 1})
    every = cpu | {"num_gpus": _share(gpus, samplers + scorers + ranks)}
    return Placement(samplers, scorers, ranks, every, every, every)


def _share(amount: float, among: int) -> float:
    """What each of `among` actors gets of `amount` devices: a whole one, or 1/k of one so that k of them fill a
    device exactly (a fraction never spans two devices)."""
    if among <= amount:
        return 1.0
    return math.floor(10_000 / math.ceil(among / amount)) / 10_000
