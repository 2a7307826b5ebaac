"""What a run's folder says of the run: run.json, config.yaml and metrics.jsonl, held against what its newest checkpoint
knows of them. What is damaged comes from the checkpoint's copy, with a warning; what has no copy is an error that names
file and remedy. Imports neither numpy nor pyarrow."""

import itertools
import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

from records import checkpoint
from records.checkpoint import CheckpointError
from records.shapes import About, Line
from records.storage import Storage, StorageError

RUN, METRICS, CONFIG = "run.json", "metrics.jsonl", "config.yaml"
GO_WITHOUT = "put it back from a copy, or remove it: its epochs are then missing from reports and MLflow, and no more"
Warn = Callable[[str], None]


def there(storage: Storage) -> bool:
    """Whether there is a run: run.json, or a checkpoint's copy of it."""
    return storage.exists(RUN) or bool((checkpoint.newest(storage) or {}).get("run"))


def about(storage: Storage, warn: Warn) -> dict[str, Any]:
    """run.json. Raises a StorageError where there is no run, or nothing that says which."""
    if not there(storage):
        raise StorageError(f"there is no {RUN} in {storage}; give a run's directory")
    try:
        return storage.read_json(RUN, About)
    except StorageError as error:
        newest = checkpoint.newest(storage) or {}
        if not newest.get("run"):
            raise StorageError(f"{error}; no checkpoint has one, either") from error
        warn(f"{error}; the copy in {checkpoint.name_of(newest['step'])} is used")
        return newest["run"]


def settings(storage: Storage, known: dict[str, Any], warn: Warn) -> bytes:
    """config.yaml as it was written, where that is known of it (`known`, run.json) or a checkpoint has it."""
    content, fault = b"", ""
    try:
        content = storage.read(CONFIG)
        if sha256(content).hexdigest() == known.get("config_sha256", ""):
            return content
        fault = f"{CONFIG} in {storage} is not as it was written, its sha256 differs" * ("config_sha256" in known)
    except StorageError as error:
        fault = str(error)
    for step in reversed(checkpoint.steps(storage)) if fault else ():
        try:
            copy = checkpoint.read(storage, checkpoint.manifest(storage, step, known["run_id"]), CONFIG)
        except CheckpointError:
            continue
        warn(f"{fault}; the copy in {checkpoint.name_of(step)} is used")
        return copy
    if not content and fault:
        raise StorageError(f"{fault}: put it back from a copy, or choose another run.dir; no checkpoint has one")
    if fault and checkpoint.steps(storage):  # without one a run begins anew
        warn(f"{fault}; no checkpoint has a whole copy, so it is taken as it is")
    return content  # older runs know no more


def lines(storage: Storage, closed: dict[str, Any] | None, warn: Warn) -> list[dict[str, Any]]:
    """metrics.jsonl, epoch by epoch. `closed` is the newest checkpoint's manifest, read before. Raises a StorageError
    where a line is damaged or is not as it was when the checkpoint was made; warns of epochs without a line."""
    found = storage.read_json_lines(METRICS, Line, GO_WITHOUT)
    epochs = [line["epoch"] for line in found]
    if any(later <= epoch for epoch, later in itertools.pairwise(epochs)):
        raise StorageError(f"{METRICS} in {storage} is damaged (its epochs are not in order): {GO_WITHOUT}")
    if closed is None:
        return found
    before = [line for line in found if line["epoch"] < closed["next_epoch"]]
    written = closed.get("metrics_sha256") in (None, digest(before))
    if before and not written:
        raise StorageError(f"{METRICS} in {storage} is not as it was written, its sha256 differs: {GO_WITHOUT}")
    if missing := closed["next_epoch"] - sum(line["epoch"] >= 0 for line in before):
        warn(f"{METRICS} in {storage} lacks {missing} of {closed['next_epoch']} epochs, and so will reports and MLflow")
    elif not written:
        warn(f"{METRICS} in {storage} lacks the evaluation before training, and so will reports and MLflow")
    return found


def text(metrics: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in metrics).encode()


def digest(metrics: Sequence[dict[str, Any]]) -> str:
    """sha256 of these lines as they are written."""
    return sha256(text(metrics)).hexdigest()
