"""The words of reward settings. Imports no torch: the configuration is checked without it."""

from typing import Any, Literal, get_args

Normalise = Literal["none", "prompt", "epoch"]  # rewards/mixture.py
FeatureKind = Literal["pixels", "clip"]  # rewards/judges.py


def wrong_normalise(how: Any) -> str:
    """What is wrong with reward.options.normalise; empty: nothing."""
    known = get_args(Normalise)
    return "" if how in known else f"reward.options.normalise: expected {', '.join(known)}, got {how!r}"
