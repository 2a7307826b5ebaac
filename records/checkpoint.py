"""Checkpoints: `checkpoints/step-NNNNNN/`, all that a run needs to go on bitwise; step counts policy updates.

    lora/            adapter for diffusers and, as kohya.safetensors, the same for ComfyUI and A1111
    learner.pt       adapter, flow network, both optimizers         (learner/state.py)
    replay-RANK.pt   rollouts that the flow fits draw from
    config.yaml      every setting
    state.json       the manifest, written last: cursor, ledger, versions, batch sizes, sha256 of all files and its own

Only what the manifest lists is read. There is no random state to keep: every draw is keyed by what it is for."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from diffusion.failures import RunFailure
from records.shapes import Manifest, Written
from records.storage import Storage, StorageError, sealed

FORMAT = 6  # of run.json, checkpoints and the trajectories' columns
FOLDER, MANIFEST, LATEST = "checkpoints", "state.json", "latest"
COPY = "put it back from a copy, or go on from another checkpoint"


class CheckpointError(RunFailure, ValueError):
    """A checkpoint that is torn, was changed, or is of another format; the message names it and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    name: str  # checkpoints/step-NNNNNN
    manifest: dict[str, Any]
    files: dict[str, bytes]


def name_of(step: int) -> str:
    return f"{FOLDER}/step-{step:06d}"


def save(storage: Storage, about: dict[str, Any], files: dict[str, bytes]) -> None:
    """In one piece; `checkpoints/latest` is pointed at it where the storage has links."""
    name, sums = name_of(about["step"]), {file: sha256(content).hexdigest() for file, content in files.items()}
    storage.write_folder(name, {**files, MANIFEST: sealed({"format": FORMAT, **about, "files": sums})})
    latest, target = f"{FOLDER}/{LATEST}", name.removeprefix(f"{FOLDER}/")
    if storage.local and not storage.link(latest, target):
        with contextlib.suppress(StorageError):  # in a copied run it may be a folder: our own is replaced
            if storage.read_json(f"{latest}/{MANIFEST}", Manifest)["run_id"] == about["run_id"]:
                storage.remove(latest)
                storage.link(latest, target)


def steps(storage: Storage) -> list[int]:
    """Steps of the checkpoints here, oldest first; whole or not."""
    names = (name.removeprefix("step-") for name in storage.entries(FOLDER) if name.startswith("step-"))
    return sorted(int(name) for name in names if name.isdigit())


def manifest(storage: Storage, step: int, run_id: str | None) -> dict[str, Any]:
    """Of one checkpoint, without reading its files. Raises a CheckpointError where there is none, or it is damaged, was
    changed, or is of another format, step or run (None: of whatever run)."""
    place, file = f"{storage}/{name_of(step)}", f"{name_of(step)}/{MANIFEST}"
    try:
        if (written_as := storage.read_json(file, Written, COPY)["format"]) == FORMAT:
            about = storage.read_json(file, Manifest, COPY)
    except StorageError as error:
        raise CheckpointError(f"{place} is not whole: {error}") from error
    if written_as != FORMAT:
        raise CheckpointError(
            f"{place} is of format {written_as}, this Tributary reads {FORMAT}: use the version that wrote it, or "
            "start afresh with run.resume=never and another run.dir"
        )
    if (origin := (about["step"], about["run_id"])) != (step, run_id or about["run_id"]):
        written = f"it was written as step {origin[0]} of run {origin[1]:.40}"
        raise CheckpointError(f"{place} is not its own, {written}: {COPY}")
    return about


def newest(storage: Storage, run_id: str | None = None) -> dict[str, Any] | None:
    """Manifest of the newest checkpoint that has a whole one; a torn one, or one just being pruned, has none."""
    for step in reversed(steps(storage)):
        with contextlib.suppress(CheckpointError):
            return manifest(storage, step, run_id)
    return None


def read(storage: Storage, about: dict[str, Any], file: str) -> bytes:
    """A file of the checkpoint with this manifest. Raises a CheckpointError where it is missing or was changed."""
    name = name_of(about["step"])
    try:
        content = storage.read(f"{name}/{file}")
    except StorageError as error:
        raise CheckpointError(f"{storage}/{name} is not whole: {error}") from error
    if sha256(content).hexdigest() != about["files"].get(file):
        raise CheckpointError(f"{storage}/{name}/{file} is not what was written, its sha256 differs: {COPY}")
    return content


def load(storage: Storage, step: int, run_id: str) -> Checkpoint:
    """With all its files. Raises a CheckpointError as `manifest` and `read` do."""
    about = manifest(storage, step, run_id)
    return Checkpoint(name_of(step), about, {file: read(storage, about, file) for file in about["files"]})


def load_newest(storage: Storage, run_id: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; `warn` hears of each that is passed over. Raises a CheckpointError if there are
    some, but none is whole."""
    fault: CheckpointError | None = None
    for step in reversed(steps(storage)):
        try:
            return load(storage, step, run_id)
        except CheckpointError as error:
            fault = error
            warn(f"{error}; trying the one before it")
    if fault:
        raise fault
    return None


def lora_folder(storage: Storage) -> str:
    """Path or URL of the newest checkpoint's adapter, for other programs."""
    return f"{storage}/{FOLDER}/{LATEST}/lora" if storage.local else f"{storage}/{name_of(steps(storage)[-1])}/lora"


def drop_after(storage: Storage, step: int, named: set[int]) -> None:
    """Remove the checkpoints of later steps: they were passed over. Raises a CheckpointError, and removes none,
    if there is one that the run's records do not name."""
    later = [other for other in steps(storage) if other > step]
    for other in later:
        if other not in named:
            raise CheckpointError(
                f"{storage}/{name_of(other)} is not this run's: its records name no such step; move it away"
            )
    for other in later:
        storage.remove(name_of(other))


def prune(
    storage: Storage, keep: int, always: set[int], named: set[int], run_id: str, warn: Callable[[str], None]
) -> None:  # fmt: skip
    """Remove those that the run's records name (`named` steps) but the newest `keep` of them and the steps in `always`;
    keep 0 keeps all. The newest whole one stays in any case: it is read back before anything goes. Raises a
    CheckpointError if none is whole: none goes."""
    spare = [step for step in steps(storage) if step in named][:-keep] if keep else []
    spare = [step for step in spare if step not in always]
    newest = load_newest(storage, run_id, warn) if spare else None
    for step in spare:
        if newest and step < newest.manifest["step"]:
            storage.remove(name_of(step))
