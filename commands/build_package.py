"""Builds the environment of a reward package: `python -m rewards.package build imagereward|hpsv2`."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from rewards.package_environment import MARKER, NAMES, EnvironmentMissing, find, lock, place

BUILD_SECONDS = 3600  # of one step, and for another's build
BPE = "bpe_simple_vocab_16e6.txt.gz"


class BuildFailed(RuntimeError):
    """An environment could not be built; the message has the command and what it said last."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: there is a whole environment; 1: it could not be built."""
    parser = argparse.ArgumentParser(prog="python -m rewards.package", description=__doc__)
    parser.add_argument("command", choices=["build"], help="make the environment that a package runs in")
    parser.add_argument("name", choices=NAMES)
    name = parser.parse_args(arguments).name
    try:
        build(name)
    except BuildFailed as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    print(f"python -m rewards.serve {name} --package")
    return 0


def build(name: str) -> Path:
    """The interpreter of a whole environment, which is built where it is not there: aside, and renamed at the end, so
    that half of one is never found; builds at once wait for each other. Raises BuildFailed."""
    folder = place(name)
    aside = folder.with_name(f".{name}.building")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{name}.lock"), timeout=BUILD_SECONDS):
            with contextlib.suppress(EnvironmentMissing):
                return find(name)
            print(f"{name}: building in {folder} (some minutes)", file=sys.stderr)
            shutil.rmtree(aside, ignore_errors=True)  # of a build that was killed
            try:
                _install(name, aside)
                shutil.rmtree(folder, ignore_errors=True)  # of another lock file
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise BuildFailed(str(error)) from error
    return find(name)


def _install(name: str, folder: Path) -> None:
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "venv", str(folder)])
    # torch with its dependencies: they differ by machine (CUDA's libraries, or none).
    _run([*pip, "--constraint", str(lock(name)), "torch", "setuptools", "wheel"])
    # The packages' own pins contradict each other, hence --no-deps; and a source distribution is built with the pinned
    # tools, not with the newest.
    _run([*pip, "--no-deps", "--no-build-isolation", "--requirement", str(lock(name))])
    if name == "hpsv2":  # its wheel lacks the vocabulary of its tokenizer, which open_clip_torch's has
        [packages] = folder.glob("lib/python*/site-packages")
        shutil.copyfile(packages / "open_clip" / BPE, packages / "hpsv2" / "src" / "open_clip" / BPE)
    shutil.copyfile(lock(name), folder / MARKER)


def _run(command: list[str]) -> None:
    # A pip or python setting of the caller's own environment has no business in this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    try:
        subprocess.run(command, check=True, env=environment, timeout=BUILD_SECONDS, **streams)
    except subprocess.SubprocessError as error:  # it failed, or took too long
        lines = str(error.stderr or error.stdout or "").strip().splitlines()  # type: ignore[attr-defined]
        raise BuildFailed("\n  ".join([str(error), *lines[-5:]])) from error
