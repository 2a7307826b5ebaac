"""The words of reward settings. Imports no torch: the configuration is checked without it."""

from typing import Literal

Backend = Literal["native", "package"]
Normalise = Literal["none", "prompt", "epoch"]  # rewards/mixture.py
FeatureKind = Literal["pixels", "clip"]  # rewards/judges.py
