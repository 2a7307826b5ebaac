"""Learning: objectives, the flow network, the update step, the epoch loop and its command line."""

import importlib
import importlib.machinery
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

# As in diffusion/__init__.py, and for commands that import diffusers before anything of diffusion/.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

if TYPE_CHECKING:
    from learner.api import TrainedRun, train
    from learner.config import Config, ConfigError, load_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("actors", "cluster", "commands", "diffusion", "evaluation", "models", "records", "reports", "rewards")
__all__ = ["Config", "ConfigError", "TrainedRun", "load_config", "train"]


def hidden() -> list[str]:
    """What on sys.path, such as a user's own rewards.py, hides a package of ours; a line each, with the remedy."""
    faults = []
    for name in PACKAGES:
        spec = importlib.machinery.PathFinder.find_spec(name)
        places = [] if spec is None else list(spec.submodule_search_locations or [spec.origin or ""])
        if places and all(Path(place).resolve() != ROOT / name for place in places):
            faults.append(f"{places[0]} hides Tributary's own package {name!r}: rename it")
    return faults


def __getattr__(name: str) -> Any:
    """Public names, imported when they are asked for: commands that need none of them start fast."""
    if name not in __all__:
        raise AttributeError(f"module 'learner' has no attribute {name!r}")
    if faults := hidden():
        raise ImportError("; ".join(faults))
    module = "learner.api" if name in ("train", "TrainedRun") else "learner.config"
    return getattr(importlib.import_module(module), name)
