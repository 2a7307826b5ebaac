"""Environments of the reward packages' own, in the user's cache: where they are, and whether one is whole.
commands/build_package.py builds them."""

import os
from pathlib import Path

NAMES = ("hpsv2", "imagereward")
MARKER = "tributary-lock.txt"  # in a whole environment: the lock file that it was built from


class EnvironmentMissing(ValueError):
    """No environment for a package where it was looked for, or not one that fits; the message says how to get it."""


def place(name: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "tributary" / "packages" / name


def lock(name: str) -> Path:
    return Path(__file__).resolve().parent / "locks" / f"{name}.txt"


def find(name: str) -> Path:
    """The interpreter of a whole environment. Raises EnvironmentMissing where there is none, or one of another lock."""
    python, marker = place(name) / "bin" / "python", place(name) / MARKER
    # An interpreter that was removed since leaves a link to nowhere.
    if marker.is_file() and marker.read_bytes() == lock(name).read_bytes() and python.exists():
        return python
    raise EnvironmentMissing(
        f"--package: there is no environment for {name} in {place(name)}, or one of another Tributary; `python -m "
        f"rewards.package build {name}` builds it (some minutes, 1.2 GB), on every machine that serves it"
    )
