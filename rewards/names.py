"""The words of reward settings. Imports no torch: the configuration is checked without it."""

from typing import Literal

FeatureKind = Literal["pixels", "clip"]  # rewards/judges.py
