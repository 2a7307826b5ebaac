"""FLOPs of the reward models that Tributary knows, counted on networks without weights."""

from __future__ import annotations

from learner.sections import RewardConfig


def reward_cost(reward: RewardConfig) -> float | None:
    """FLOPs of scoring one image at the published size; None for a reward that is not known."""
    return None
