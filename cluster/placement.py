"""How many actors of each role, and which share of the machine each gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

from learner.config import Config


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


def place_for(config: Config, resources: dict[str, float]) -> Placement:
    """Placement of a run on the cluster's resources.

    Raises:
        PlacementError: they do not fit.
    """
    chunks_per_update = config.train.trajectories // config.sampler.chunk_size // config.train.updates_per_epoch
    gpus = resources.get("GPU", 0.0)
    if config.model.device == "cuda" and not gpus:
        raise PlacementError("model.device: cuda was asked for, but the cluster has no GPU")
    if config.model.device == "cpu":
        resources = {**resources, "GPU": 0.0}
    return place(
        config.sampler.actors, config.reward.actors, config.learner.ranks, chunks_per_update, resources,
        (config.sampler.gpus, config.reward.gpus, config.learner.gpus),
    )  # fmt: skip


def place(
    samplers: int | None, scorers: int | None, ranks: int | None, chunks_per_update: int, resources: dict[str, float],
    gpus_each: tuple[float | None, float | None, float | None] = (None, None, None),
) -> Placement:  # fmt: skip
    """Counts as given, else from the resources; CPUs are shared out evenly, in fractions if need be.

    `gpus_each` are the GPUs of a sampler, a scorer and a rank where the config says so. Otherwise each learner rank
    takes a whole one and samplers and scorers share the rest; if too few are left for that, all roles share all GPUs.

    Raises:
        PlacementError: no CPU at all, more GPUs asked for than there are or one and a part, or a number of ranks among
            which an update's chunks cannot be divided.
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
    counts = (samplers, scorers, ranks)
    cpu = _share(cpus, sum(counts))
    each = _gpus(counts, gpus_each, gpus)
    asked = sum(count * share for count, share in zip(counts, each, strict=True))
    if asked > gpus + 1e-6:
        raise PlacementError(
            f"sampler.gpus, reward.gpus, learner.gpus: {samplers} x {each[0]:g} + {scorers} x {each[1]:g} + "
            f"{ranks} x {each[2]:g} = {asked:g} GPUs asked for, the cluster has {gpus}"
            + ("" if gpus else " (or model.device is cpu)")
        )
    for key, share in zip(("sampler", "reward", "learner"), each, strict=True):
        if share > 1 and share != int(share):
            raise PlacementError(f"{key}.gpus: {share:g} is neither a whole number of GPUs nor a part of one")
    options = [{"num_cpus": cpu} | ({"num_gpus": share} if share else {}) for share in each]
    return Placement(samplers, scorers, ranks, *options)


def _gpus(
    counts: tuple[int, int, int], asked: tuple[float | None, float | None, float | None], gpus: int
) -> tuple[float, float, float]:
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
    return math.floor(10_000 / math.ceil(among / amount)) / 10_000
