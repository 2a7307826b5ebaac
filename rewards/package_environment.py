"""Environments of the reward packages' own: where they are, and whether one is whole. commands/build_package.py builds
them."""

from __future__ import annotations

import os
from pathlib import Path

NAMES = ("hpsv2", "imagereward")
MARKER = "tributary-lock.txt"  # in a whole environment: the lock file that it was built from


class EnvironmentMissing(ValueError):
    """No environment for a package where it was looked for, or not one that fits; the message says how to get it."""


def default_folder(name: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "tributary" / "packages" / name


def interpreter(folder: Path) -> Path:
    return folder / "bin" / "python"


def lock(name: str) -> Path:
    return Path(__file__).resolve().parent / "locks" / f"{name}.txt"


def fits(name: str, folder: Path) -> bool:
    """Whether the folder holds a whole environment. An interpreter that was removed since leaves a link to nowhere."""
    marker = folder / MARKER
    return marker.is_file() and marker.read_bytes() == lock(name).read_bytes() and interpreter(folder).exists()


def find(name: str, python: str | None = None) -> Path:
    """The interpreter for a package: a user's own choice, or that of the environment `build` makes. Raises
    EnvironmentMissing where it is not there, or was built from another lock file."""
    command = f"python -m rewards.package build {name}"
    if python is not None:
        path = Path(python).expanduser().absolute()  # not resolve(): the link is what tells python its environment
        if path.is_file() and os.access(path, os.X_OK):
            return path
        raise EnvironmentMissing(
            f"reward.options.python: {path} is no interpreter; `{command}` builds and prints its own"
        )
    folder = default_folder(name)
    if fits(name, folder):
        return interpreter(folder)
    raise EnvironmentMissing(
        f"reward.backend: there is no environment for {name} in {folder}, or one of another Tributary; `{command}` "
        "builds it (some minutes, 1.2 GB), on every machine that scores; or name an interpreter that has the package: "
        "reward.options.python"
    )
