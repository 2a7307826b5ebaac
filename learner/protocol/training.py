"""What a learner tells of an epoch of training."""

from __future__ import annotations

from dataclasses import dataclass

from learner.protocol.quarantine import SetAside


@dataclass(frozen=True)
class Training:
    """What an epoch of training did, means over ranks: loss and its parts by objective, drift (squared change of the
    output since rollout), kl (nats a transition, rollout policy to current), gradient norms, flow loss."""

    metrics: dict[str, float]  # means over the epoch's updates
    updates: list[dict[str, float]]  # the same of each update
    trajectory_ids: tuple[int, ...]  # this rank's, in the order trained
    set_aside: tuple[SetAside, ...] = ()  # this rank's bad ones
