"""Proof that new weights arrived: what a sampler found in its module against what the learner published."""

from collections.abc import Mapping, Sequence

from diffusion.failures import RunFailure
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Receipt, Trajectories


class StaleWeights(RunFailure, RuntimeError):
    """An adapter that is not the published one, too far behind (train.max_staleness), or not changed by training."""


class RanksDiverged(RunFailure, RuntimeError):
    """Learner ranks that hold different adapters after the same updates."""


def check(receipt: Receipt | Trajectories, published: Mapping[int, str], where: str) -> None:
    """Raise StaleWeights unless the adapter that sampled the chunk (`where`) is `published`, sha256 by version."""
    if published.get(receipt.policy_version) != receipt.adapter_sha256:
        each = " and ".join(f"version {version} is {sha256[:12]}" for version, sha256 in sorted(published.items()))
        raise StaleWeights(
            f"{where} was sampled by adapter {receipt.adapter_sha256[:12]} (as version {receipt.policy_version}), "
            f"but {each}: the new weights did not arrive"
        )


def check_moved(before: Snapshot, after: Snapshot) -> None:
    """Raise StaleWeights if training did not change the adapter, which `check` would not notice."""
    if after.sha256 == before.sha256:
        raise StaleWeights(
            f"version {after.version} is bitwise version {before.version}: training did not reach the adapter, "
            "or learner.learning_rate is too small for float32"
        )


def check_ranks(sha256s: Sequence[str]) -> None:
    if len(set(sha256s)) > 1:
        each = ", ".join(f"rank {rank} {sha256[:12]}" for rank, sha256 in enumerate(sha256s))
        raise RanksDiverged(f"the learner ranks' adapters differ after the same updates: {each}")
