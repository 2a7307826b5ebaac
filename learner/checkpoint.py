"""Checkpoints: `checkpoints/step-NNNNNN/`, all that a run needs to go on bitwise; step counts policy updates.

    lora/                adapter for diffusers and, as kohya.safetensors, for ComfyUI and A1111
    learner.pt           adapter, flow network, both optimizers         (learner/state.py)
    replay-RANK.pt       rollouts that the flow fits draw from
    config.yaml          every setting
    state.json           the manifest, written last: cursor, ledger, versions, batch sizes, sha256 of every file

There is no random state to keep: every draw is keyed by what it is for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.records import FORMAT
from learner.storage import Storage, StorageError

FOLDER, MANIFEST, LATEST = "checkpoints", "state.json", "latest"


class CheckpointError(ValueError):
    """A checkpoint that is torn, was changed, or is of another version; the message names it and the remedy."""


class OtherVersion(CheckpointError):
    """A checkpoint of another format: those before it will be too."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its place, its manifest, and the learner's files by name."""

    name: str  # checkpoints/step-NNNNNN
    manifest: dict[str, Any]
    files: dict[str, bytes]


def save(storage: Storage, about: dict[str, Any], files: dict[str, bytes]) -> str:
    """Write a checkpoint in one piece, and point `checkpoints/latest` at it where the storage has links.

    Raises:
        StorageError: it could not be written; those before it are untouched.
    """
    name = f"step-{about['step']:06d}"
    sums = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    text = json.dumps({"format": FORMAT, **about, "files": sums}, indent=1) + "\n"
    storage.write_folder(f"{FOLDER}/{name}", {**files, MANIFEST: text.encode()})
    if storage.local:
        _link(storage.local / FOLDER / LATEST, name)
    return f"{FOLDER}/{name}"


def steps(storage: Storage) -> list[int]:
    """Steps of the checkpoints here, oldest first; whole or not."""
    names = (name.removeprefix("step-") for name in storage.entries(FOLDER) if name.startswith("step-"))
    return sorted(int(name) for name in names if name.isdigit())


def manifest(storage: Storage, step: int) -> dict[str, Any]:
    """Of one checkpoint, without reading its files.

    Raises:
        CheckpointError: it has none, or a damaged one.
        OtherVersion: its format is not this program's.
    """
    name = f"{FOLDER}/step-{step:06d}"
    try:
        found = json.loads(storage.read(f"{name}/{MANIFEST}"))
        written_as = found["format"]
    except (StorageError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{storage}/{name} is not whole: {error}") from error
    if written_as != FORMAT:
        raise OtherVersion(
            f"{storage}/{name} is of format {written_as}, this Tributary reads {FORMAT}: use the version that "
            "wrote it, or start afresh with run.resume=never and another run.dir"
        )
    return found


def load(storage: Storage, step: int) -> Checkpoint:
    """
    Raises:
        CheckpointError: it is torn or was changed.
        OtherVersion: its format is not this program's.
    """
    name, about = f"{FOLDER}/step-{step:06d}", manifest(storage, step)
    try:
        files = {file: storage.read(f"{name}/{file}") for file in about["files"]}
    except (StorageError, KeyError) as error:
        raise CheckpointError(f"{storage}/{name} is not whole: {error}") from error
    for file, content in files.items():
        if hashlib.sha256(content).hexdigest() != about["files"][file]:
            raise CheckpointError(f"{storage}/{name}/{file} is not what was written: its sha256 differs")
    return Checkpoint(name, about, files)


def load_newest(storage: Storage, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; `warn` hears of each that is passed over.

    Raises:
        CheckpointError: there are some, but none is whole, or the newest whole one is of another version.
    """
    found = steps(storage)
    fault: CheckpointError | None = None
    for step in reversed(found):
        try:
            return load(storage, step)
        except OtherVersion:
            raise
        except CheckpointError as error:
            fault = error
            warn(f"{error}; trying the one before it")
    if fault:
        raise fault
    return None


def drop_after(storage: Storage, step: int) -> None:
    """Remove the checkpoints of later steps: they were passed over."""
    for later in steps(storage):
        if later > step:
            storage.remove(f"{FOLDER}/step-{later:06d}")


def prune(storage: Storage, keep: int, always: set[int]) -> None:
    """Remove all but the newest `keep` checkpoints and the steps in `always`; keep 0 keeps all."""
    for step in steps(storage)[:-keep] if keep else []:
        if step not in always:
            storage.remove(f"{FOLDER}/step-{step:06d}")


def _link(link: Path, name: str) -> None:
    """A convenience for people; some file systems have no links, and a copied run has a folder there."""
    aside = link.with_name(f".{LATEST}.new")
    with contextlib.suppress(OSError):
        aside.unlink(missing_ok=True)
        os.symlink(name, aside)
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        aside.replace(link)
