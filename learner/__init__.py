"""Learning: objectives, the flow network, the update step, the epoch loop and its command line."""

import importlib
import os
from typing import TYPE_CHECKING, Any

# As in diffusion/__init__.py, and for commands that import diffusers before anything of diffusion/.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

if TYPE_CHECKING:
    from learner.api import TrainedRun, train
    from learner.config import Config, ConfigError, load_config

__all__ = ["Config", "ConfigError", "TrainedRun", "load_config", "train"]


def __getattr__(name: str) -> Any:
    """Public names, imported when they are asked for: commands that need none of them start fast."""
    if name not in __all__:
        raise AttributeError(f"module 'learner' has no attribute {name!r}")
    module = "learner.api" if name in ("train", "TrainedRun") else "learner.config"
    return getattr(importlib.import_module(module), name)
