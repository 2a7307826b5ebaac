"""Which run a command means: a new one, or one to go on with; and whether it may.

The same command given again goes on where the run stopped, and does nothing where it is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from learner.config import Config, ConfigError, config_yaml, saved_config
from records import checkpoint, environment, lock
from records.checkpoint import Checkpoint
from records.run_folder import BEFORE, CONFIG, EPOCH_FOLDERS, FORMAT, METRICS, RUN, Records
from records.storage import Storage, StorageError

Warn = Callable[[str], None]


@dataclass
class OpenRun:
    """A run that this process alone may write, and the checkpoint to go on from (None: from the beginning)."""

    records: Records
    config: Config
    checkpoint: Checkpoint | None
    lock: FileLock | None

    @property
    def as_begun(self) -> Config:
        """The config with the learner ranks and batch sizes that the run began with, where it leaves them open: sums in
        another order, products of other shapes, have other last bits."""
        if self.checkpoint is None:
            return self.config
        saved, learner, reward = self.checkpoint.manifest, self.config.learner, self.config.reward
        sizes, ranks = saved["batch_sizes"], learner.ranks if self.config.run.runner == "inprocess" else saved["ranks"]
        mine = {"micro_batch": learner.micro_batch or sizes["micro_batch"], "ranks": ranks}
        reward = reward.model_copy(update={"batch": reward.batch or sizes.get("score")})
        return self.config.model_copy(update={"learner": learner.model_copy(update=mine), "reward": reward})

    @property
    def epochs_done(self) -> int:
        return int(self.checkpoint.manifest["next_epoch"]) if self.checkpoint else 0

    def close(self) -> None:
        if self.lock:
            self.lock.release()


@dataclass(frozen=True)
class Place:
    """Where the run is to live. `resumed`: it is there already. `origin`: it begins as a copy of that run, up to the
    checkpoint of `step`."""

    storage: Storage
    resumed: bool = False
    origin: Storage | None = None
    step: int = 0


def open_run(config: Config, source: Path, prompts: Sequence[str], warn: Warn) -> OpenRun:
    """The run that the config means; its folder is made if need be. `source` is the config file, which names new runs.

    Raises:
        ConfigError: run.dir or run.resume cannot be followed: another run's settings, in use, not writable ...
        CheckpointError: the run's checkpoints cannot be used.
    """
    facts = _facts(config, prompts)
    try:
        place = _find(config, source, facts)
        if place.resumed:
            return _resume(place.storage, config, facts, warn)
        if place.origin:
            return _branch(place, place.origin, config, facts)
        with _locked(place.storage) as held:
            return OpenRun(_create(place.storage, config, facts), config, None, held)
    except StorageError as error:
        raise ConfigError(f"run.dir: {error}") from error


def directory(config: Config, source: Path) -> str:
    """Path or URL of run.dir, or of a new run named after the config file `source`."""
    return _absolute(config.run.dir, config) if config.run.dir else str(_new_folder(config, source))


def whereabouts(config: Config, source: Path, prompts: Sequence[str]) -> str:
    """Where the run would live, for a plan: nothing is made.

    Raises:
        ConfigError: the run would be refused.
    """
    facts = _facts(config, prompts)
    try:
        place = _find(config, source, facts)
        if place.origin:
            _settings_of(Records.open(place.origin), config, facts)
            return f"{place.storage}, from {place.origin}/{checkpoint.name_of(place.step)}"
        if not place.resumed:
            return f"{place.storage}, new"
        records = Records.open(place.storage)
        _settings_of(records, config, facts)
        steps = checkpoint.steps(place.storage)
    except StorageError as error:
        raise ConfigError(f"run.dir: {error}") from error
    done = len([line for line in records.lines if line["epoch"] != BEFORE])
    start = f"step-{steps[-1]:06d} ({done} epochs done)" if steps else "the beginning"
    return f"{place.storage}, going on from {start}"


def _facts(config: Config, prompts: Sequence[str]) -> dict[str, Any]:
    """What a run and whoever goes on with it must share."""
    return {"config_digest": config.digest(), "prompts_sha256": sha256("\n".join(prompts).encode()).hexdigest()}


def _absolute(url: str, config: Config) -> str:
    """Relative run directories are in run.root, else in the working directory. That of a submitted Ray job is deleted
    with the job: there they are in the user's home."""
    if "://" in url:
        return url
    at_home = Path.home() / "tributary" if environment.in_submitted_job() else Path.cwd()
    root = config.run.root or str(at_home)
    if "://" in root and not url.startswith(("/", "~")):
        return f"{root.rstrip('/')}/{url}"
    return str(Path(root).expanduser().absolute() / Path(url).expanduser())


def _find(config: Config, source: Path, facts: dict[str, Any]) -> Place:
    """
    Raises:
        ConfigError: run.dir or run.resume cannot be followed.
        StorageError: a folder cannot be read.
    """
    chosen = Storage(_absolute(config.run.dir, config)) if config.run.dir else None
    if config.run.resume not in ("auto", "never"):
        return _find_named(config, chosen)
    if chosen is None:
        unfinished = _newest_unfinished(config, facts) if config.run.resume == "auto" else None
        return Place(unfinished, resumed=True) if unfinished else Place(_new_folder(config, source))
    if chosen.local and chosen.local.is_file():
        raise ConfigError(f"run.dir: {chosen} is a file")
    if not _holds_run(chosen):
        return Place(chosen)
    if config.run.resume == "never":
        raise ConfigError(f"run.dir: {chosen} already holds a run; choose another, or run.resume=auto to go on")
    if not chosen.exists(RUN):
        old = "holds a run of an older Tributary, which cannot be resumed; choose another"
        raise ConfigError(f"run.dir: {chosen} {old}")
    return Place(chosen, resumed=True)


def _find_named(config: Config, chosen: Storage | None) -> Place:
    """run.resume=PATH: a run is gone on with in place; a checkpoint too if it is its run's newest, else (or with
    another run.dir, `chosen`) it becomes the beginning of a new run."""
    url = _absolute(config.run.resume, config).rstrip("/")
    head, _, last = url.rpartition("/")
    if last == checkpoint.LATEST and Path(url).is_symlink():
        last = os.readlink(url)
    number = last.removeprefix("step-") if head.endswith(f"/{checkpoint.FOLDER}") else ""
    named = int(number) if number.isdigit() else None
    origin = Storage(url if named is None else head.removesuffix(f"/{checkpoint.FOLDER}"))
    if not origin.exists(RUN):
        raise ConfigError(
            f"run.resume: {url} is neither a run nor a checkpoint of one (RUN/checkpoints/step-N); or say auto or never"
        )
    steps = checkpoint.steps(origin)
    if named is not None and named not in steps:
        names = ", ".join(f"step-{step:06d}" for step in steps) or "none"
        raise ConfigError(f"run.resume: no checkpoint {url}; there are: {names}")
    if chosen is None or str(chosen) == str(origin):
        if named not in (None, *steps[-1:]):
            raise ConfigError(
                f"run.resume: step-{named:06d} is not the newest checkpoint of {origin} (step-{steps[-1]:06d} is); "
                "give a new run.dir to begin another run from it"
            )
        return Place(origin, resumed=True)
    if chosen.exists(RUN):  # the same command again, or a mistake
        begun_from = Records.open(chosen).about.get("branched_from") or ""
        if not begun_from.startswith(f"{origin}/" + ("" if named is None else checkpoint.name_of(named))):
            raise ConfigError(
                f"run.dir: the run in {chosen} did not begin from {config.run.resume}; choose another, or leave out "
                "run.resume to go on with it"
            )
        return Place(chosen, resumed=True)
    if not steps:
        raise ConfigError(f"run.resume: {origin} has no checkpoint yet to begin another run from")
    return Place(chosen, origin=origin, step=steps[-1] if named is None else named)


def _newest_unfinished(config: Config, facts: dict[str, Any]) -> Storage | None:
    """Of the runs in runs/ with these very settings and prompts, the newest that is not done and not in use."""
    folder = Storage(_absolute("runs", config))
    newest: tuple[float, Storage | None] = 0.0, None
    wanted = {**facts, "format": FORMAT, "finished": False}
    for name in folder.entries():
        storage = Storage(f"{folder}/{name}")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # not a run, or not ours
            about = json.loads(storage.read(RUN))
            if wanted.items() <= about.items() and about["created"] > newest[0] and not lock.in_use(storage):
                newest = about["created"], storage
    return newest[1]


def _new_folder(config: Config, source: Path) -> Storage:
    base = _absolute(f"runs/{source.stem}-{time.strftime('%Y%m%d-%H%M%S')}", config)
    storage, number = Storage(base), 2
    while _holds_run(storage):
        storage, number = Storage(f"{base}-{number}"), number + 1
    return storage


def _holds_run(storage: Storage) -> bool:
    return storage.exists(RUN) or storage.exists(METRICS)


def _create(storage: Storage, config: Config, facts: dict[str, Any], whole: bool = True) -> Records:
    name = str(storage).rstrip("/").rsplit("/", 1)[-1]
    return Records.create(storage, name, config_yaml(config), facts, whole)


def _resume(storage: Storage, config: Config, facts: dict[str, Any], warn: Warn) -> OpenRun:
    with _locked(storage) as held:
        storage.tidy()
        records = Records.open(storage)
        saved = _settings_of(records, config, facts)
        newest = checkpoint.load_newest(storage, records.run_id, warn)
        done = newest.manifest["next_epoch"] if newest else 0
        _refuse_fewer(config, done, storage)
        if config.train.epochs != saved.train.epochs and config.objective.anneal_fraction and done:
            warn(
                f"train.epochs is {config.train.epochs} now, it was {saved.train.epochs}: beta's schedule "
                "(objective.anneal_fraction) spans the new number from here on"
            )
        if newest:
            _warn_of_batches(config, newest.manifest["batch_sizes"], warn)
            checkpoint.drop_after(storage, newest.manifest["step"])
        records.drop_after(done if newest else BEFORE)
        storage.write(CONFIG, config_yaml(config))  # what may change may have
        return OpenRun(records, config, newest, held)


def _branch(place: Place, origin: Storage, config: Config, facts: dict[str, Any]) -> OpenRun:
    """A new run that begins as a copy of another's up to a checkpoint. Its run.json comes last: a copy that was cut
    short is no run, and is made again."""
    target, before = place.storage, Records.open(origin)
    _settings_of(before, config, facts)
    chosen = checkpoint.load(origin, place.step, before.run_id)
    done = chosen.manifest["next_epoch"]
    _refuse_fewer(config, done, origin)
    with _locked(target) as held:
        records = _create(target, config, {**facts, "branched_from": f"{origin}/{chosen.name}"}, whole=False)
        for folder in EPOCH_FOLDERS:
            for name in origin.entries(folder):
                target.write(f"{folder}/{name}", origin.read(f"{folder}/{name}"))
        records.drop_after(done)
        manifest = {**chosen.manifest, "run_id": records.run_id, "mlflow_run_id": None}
        checkpoint.save(target, manifest, chosen.files)
        records.keep([line for line in before.lines if line["epoch"] < done])
        records.note()
        return OpenRun(records, config, checkpoint.load(target, place.step, records.run_id), held)


@contextlib.contextmanager
def _locked(storage: Storage) -> Iterator[FileLock | None]:
    """The run's lock, which stays held unless what is done with it fails."""
    held = lock.take(storage)
    try:
        yield held
    except BaseException:
        if held:
            held.release()
        raise


def _settings_of(records: Records, config: Config, facts: dict[str, Any]) -> Config:
    """The run's own settings, when this config may go on with it.

    Raises:
        ConfigError: it may not; a line for each key that differs.
    """
    storage, about = records.storage, records.about
    if about["format"] != FORMAT:
        raise ConfigError(
            f"run.dir: {storage} is of format {about['format']}, this Tributary reads {FORMAT}: use the version that "
            "wrote it, or choose another run.dir"
        )
    saved = saved_config(records)
    if about["config_digest"] != facts["config_digest"]:
        ours, theirs = config.binding(), saved.binding()
        faults = [
            f"{key}: the run in {storage} has {theirs[key]!r}, not {ours[key]!r}; use that, or another run.dir"
            for key in ours
            if ours[key] != theirs[key]
        ]
        raise ConfigError("\n".join(faults) or f"run.dir: {storage} was begun with other settings")
    if about["prompts_sha256"] != facts["prompts_sha256"]:
        raise ConfigError(
            f"prompts.path: {config.prompts.path} (or evaluation.prompts) is not what the run in {storage} "
            "began with; put the old file back, or choose another run.dir"
        )
    return saved


def _warn_of_batches(config: Config, begun: dict[str, int], warn: Warn) -> None:
    for key, size, name in (
        ("learner.micro_batch", config.learner.micro_batch, "micro_batch"),
        ("reward.batch", config.reward.batch, "score"),
    ):
        if size and size != begun.get(name, size):
            warn(f"{key} is {size} now, it was {begun[name]}: last bits differ from here on from an unbroken run's")


def _refuse_fewer(config: Config, done: int, storage: Storage) -> None:
    if config.train.epochs < done:
        raise ConfigError(f"train.epochs: {config.train.epochs}, but the run in {storage} has done {done} already")
