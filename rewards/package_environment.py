"""Environments of the reward packages' own: where they are, and whether one is whole. commands/build_package.py builds
them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

NAMES = ("hpsv2", "imagereward")
MARKER = "tributary.json"


class EnvironmentMissing(ValueError):
    """No environment for a package where it was looked for, or not one that fits; the message says how to get it."""


def default_folder(name: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "tributary" / "packages" / name


def interpreter(folder: Path) -> Path:
    return folder / "bin" / "python"


def lock(name: str) -> Path:
    return Path(__file__).resolve().parent / "locks" / f"{name}.txt"


def pins(name: str) -> dict[str, str]:
    """Package -> `package==version`, in the lock file's order."""
    lines = (line.strip() for line in lock(name).read_text(encoding="utf-8").splitlines())
    return {line.partition("==")[0]: line for line in lines if line and not line.startswith("#")}


def find(name: str, python: str | None = None) -> Path:
    """The interpreter for a package: a user's own choice, or that of the environment `build` makes.

    Raises:
        EnvironmentMissing: it is not there, or was built from another lock file.
    """
    command = f"python -m rewards.package build {name}"
    if python is not None:
        path = Path(python).expanduser()
        if not os.access(path, os.X_OK) or path.is_dir():
            raise EnvironmentMissing(
                f"reward.options.python: {path} is no interpreter; `{command}` makes an environment and prints its own"
            )
        return path.absolute()  # not resolve(): the link is what tells python its environment
    folder = default_folder(name)
    if not interpreter(folder).exists() or not (folder / MARKER).exists():
        raise EnvironmentMissing(
            f"reward.backend: there is no environment for {name} in {folder}; `{command}` builds it (some minutes, "
            "1.2 GB), on every machine that scores; or name an interpreter that has the package: reward.options.python"
        )
    if not fits(name, folder):
        raise EnvironmentMissing(
            f"reward.backend: the environment in {folder} was built for another Tributary; `{command}` renews it"
        )
    return interpreter(folder)


def marker(name: str) -> str:
    """What the MARKER of a whole environment holds."""
    digest = hashlib.sha256("\n".join(pins(name).values()).encode()).hexdigest()
    return json.dumps({"package": name, "lock_sha256": digest})


def fits(name: str, folder: Path) -> bool:
    """Whether the folder holds a whole environment. An interpreter that was removed since leaves a link to nowhere."""
    file = folder / MARKER
    return file.is_file() and file.read_bytes() == marker(name).encode() and interpreter(folder).exists()
