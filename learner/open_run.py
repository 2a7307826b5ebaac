"""Which run a command means: a new one, or one to go on with; and whether it may.

The same command given again goes on where the run stopped, and does nothing where it is done.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from learner.config import Config, ConfigError
from records import checkpoint, environment
from records.checkpoint import Checkpoint
from records.run_folder import BEFORE, EPOCH_FOLDERS, FORMAT, METRICS, RUN, Records
from records.storage import Storage, StorageError

LOCK = "run.lock"


@dataclass
class OpenRun:
    """A run that this process alone may write, and the checkpoint to go on from (None: from the beginning)."""

    records: Records
    config: Config
    checkpoint: Checkpoint | None
    lock: int | None = None  # file descriptor; the kernel drops the lock with the process

    @property
    def as_begun(self) -> Config:
        """The config with the learner ranks and batch sizes that the run began with, where it leaves them open: sums in
        another order, products of other shapes, have other last bits."""
        if self.checkpoint is None:
            return self.config
        saved, config = self.checkpoint.manifest, self.config
        sizes = saved["batch_sizes"]
        learner = {"micro_batch": config.learner.micro_batch or sizes["micro_batch"]}
        if config.run.runner != "inprocess":
            learner["ranks"] = saved["ranks"]
        reward = {"batch": config.reward.batch or sizes.get("score")}
        return config.model_copy(
            update={
                "learner": config.learner.model_copy(update=learner),
                "reward": config.reward.model_copy(update=reward),
            }
        )

    @property
    def epochs_done(self) -> int:
        return int(self.checkpoint.manifest["next_epoch"]) if self.checkpoint else 0

    def close(self) -> None:
        _unlock(self.lock)
        self.lock = None


def open_run(config: Config, source: Path, prompts: Sequence[str], warn: Callable[[str], None]) -> OpenRun:
    """The run that the config means; its folder is made if need be. `source` is the config file, which names new runs.

    Raises:
        ConfigError: run.dir or run.resume cannot be followed: another run's settings, in use, not writable ...
        CheckpointError: the run's checkpoints cannot be used.
    """
    facts = _facts(config, prompts)
    try:
        if config.run.resume not in ("auto", "never"):
            return _from_path(config, facts, warn)
        if config.run.dir is None:
            found = _newest_unfinished(config, facts) if config.run.resume == "auto" else None
            return _go_on(found, config, facts, warn) if found else _begin(_new_url(config, source), config, facts)
        storage = Storage(_absolute(config.run.dir, config))
        if not _holds_run(storage):
            return _begin(str(storage), config, facts)
        if config.run.resume == "never":
            raise ConfigError(f"run.dir: {storage} already holds a run; choose another, or run.resume=auto to go on")
        return _go_on(storage, config, facts, warn)
    except StorageError as error:
        raise ConfigError(f"run.dir: {error}") from error


def directory(config: Config, source: Path) -> str:
    """Path or URL of run.dir, or of a new run named after the config file `source`."""
    return _absolute(config.run.dir, config) if config.run.dir else _new_url(config, source)


def whereabouts(config: Config, source: Path, prompts: Sequence[str]) -> str:
    """Where the run would live, for a plan: nothing is made.

    Raises:
        ConfigError: the run would be refused.
    """
    facts = _facts(config, prompts)
    try:
        if config.run.resume not in ("auto", "never"):
            origin, step = _named(config)
            _settings_of(Records.open(origin), config, facts)
            place = str(Storage(_absolute(config.run.dir, config))) if config.run.dir else str(origin)
            return f"{place}, from {origin}" + ("" if step is None else f"/{checkpoint.FOLDER}/step-{step:06d}")
        storage = Storage(_absolute(config.run.dir, config)) if config.run.dir else None
        if storage is None:
            found = _newest_unfinished(config, facts) if config.run.resume == "auto" else None
            storage = found or Storage(_new_url(config, source))
        if storage.local and storage.local.exists() and not storage.local.is_dir():
            raise ConfigError(f"run.dir: {storage} is a file")
        if not _holds_run(storage):
            return f"{storage}, new"
        if config.run.resume == "never":
            raise ConfigError(f"run.dir: {storage} already holds a run; choose another, or run.resume=auto to go on")
        records = Records.open(storage)
        _settings_of(records, config, facts)
    except StorageError as error:
        raise ConfigError(f"run.dir: {error}") from error
    steps = checkpoint.steps(storage)
    done = len([line for line in records.lines if line["epoch"] >= 0])
    return f"{storage}, going on from " + (f"step-{steps[-1]:06d} ({done} epochs done)" if steps else "the beginning")


def _facts(config: Config, prompts: Sequence[str]) -> dict[str, Any]:
    """What a run and whoever goes on with it must share."""
    return {"config_digest": config.digest(), "prompts_sha256": sha256("\n".join(prompts).encode()).hexdigest()}


def root(config: Config) -> str:
    """What relative run directories are relative to. A submitted Ray job's working directory is deleted with the job,
    so there it is a folder in the user's home."""
    if config.run.root:
        return config.run.root if "://" in config.run.root else str(Path(config.run.root).expanduser().absolute())
    return str(Path.home() / "tributary") if environment.in_submitted_job() else str(Path.cwd())


def _absolute(url: str, config: Config) -> str:
    if "://" in url:
        return url
    path = Path(url).expanduser()
    return str(path) if path.is_absolute() else f"{root(config).rstrip('/')}/{path}"


def _new_url(config: Config, source: Path) -> str:
    base = _absolute(f"runs/{source.stem}-{time.strftime('%Y%m%d-%H%M%S')}", config)
    url, number = base, 2
    while _holds_run(Storage(url)):
        url, number = f"{base}-{number}", number + 1
    return url


def _holds_run(storage: Storage) -> bool:
    return storage.exists(RUN) or storage.exists(METRICS)


def _newest_unfinished(config: Config, facts: dict[str, Any]) -> Storage | None:
    """Of the runs in runs/ with these very settings and prompts, the newest that is not done and not in use."""
    folder = Storage(_absolute("runs", config))
    found = []
    for name in folder.entries():
        storage = Storage(f"{folder}/{name}")
        try:
            about = json.loads(storage.read(RUN))
            same = all(about[key] == value for key, value in facts.items())
            if same and about["format"] == FORMAT and not about["finished"] and not in_use(storage):
                found.append((about["created"], storage))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a run, or not one of ours
    return max(found, key=lambda item: item[0])[1] if found else None


def _begin(url: str, config: Config, facts: dict[str, Any]) -> OpenRun:
    storage = Storage(url)
    lock = _lock(storage, make=True)
    try:
        return OpenRun(Records.create(storage, _name_of(url), config, facts), config, None, lock)
    except BaseException:
        _unlock(lock)
        raise


def _go_on(storage: Storage, config: Config, facts: dict[str, Any], warn: Callable[[str], None]) -> OpenRun:
    if not storage.exists(RUN):
        raise ConfigError(
            f"run.dir: {storage} holds a run of an older Tributary, which cannot be resumed; choose another"
        )
    lock = _lock(storage)
    try:
        storage.tidy()
        records = Records.open(storage)
        saved = _settings_of(records, config, facts)
        newest = checkpoint.load_newest(storage, records.run_id, warn)
        if newest:
            _warn_of_batches(config, newest, warn)
        done = newest.manifest["next_epoch"] if newest else 0
        _refuse_fewer(config, done, storage)
        if config.train.epochs != saved.train.epochs and config.objective.anneal_fraction and done:
            warn(
                f"train.epochs is {config.train.epochs} now, it was {saved.train.epochs}: beta's schedule "
                "(objective.anneal_fraction) spans the new number from here on"
            )
        if newest:
            checkpoint.drop_after(storage, newest.manifest["step"])
        records.drop_after(done if newest else BEFORE)
        records.save_config(config)  # what may change may have
        return OpenRun(records, config, newest, lock)
    except BaseException:
        _unlock(lock)
        raise


def _from_path(config: Config, facts: dict[str, Any], warn: Callable[[str], None]) -> OpenRun:
    """run.resume=PATH: a run is gone on with in place; a checkpoint too if it is its run's newest, else (or with
    another run.dir) it becomes the beginning of a new run."""
    storage, step = _named(config)
    target = Storage(_absolute(config.run.dir, config)) if config.run.dir else storage
    found = checkpoint.steps(storage)
    chosen = step if step is not None else (found[-1] if found else None)
    if str(target) == str(storage):
        if chosen is not None and chosen != found[-1]:
            raise ConfigError(
                f"run.resume: step-{chosen:06d} is not the newest checkpoint of {storage} (step-{found[-1]:06d} is); "
                "give a new run.dir to begin another run from it"
            )
        return _go_on(storage, config, facts, warn)
    if target.exists(RUN):  # the same command again, or a mistake
        begun_from = Records.open(target).about.get("branched_from") or ""
        wanted = f"{storage}/" if step is None else f"{storage}/{checkpoint.FOLDER}/step-{step:06d}"
        if not begun_from.startswith(wanted):
            raise ConfigError(
                f"run.dir: the run in {target} did not begin from {config.run.resume}; choose another, or leave out "
                "run.resume to go on with it"
            )
        return _go_on(target, config, facts, warn)
    if chosen is None:
        raise ConfigError(f"run.resume: {storage} has no checkpoint yet to begin another run from")
    return _branch(storage, chosen, target, config, facts)


def _named(config: Config) -> tuple[Storage, int | None]:
    """The run, and the step if one is given, that run.resume=PATH names.

    Raises:
        ConfigError: there is none.
    """
    url = _absolute(config.run.resume, config).rstrip("/")
    head, _, last = url.rpartition("/")
    if last == checkpoint.LATEST and Path(url).is_symlink():
        last = os.readlink(url)
    text = last.removeprefix("step-")
    is_step = last.startswith("step-") and text.isdigit() and head.endswith(f"/{checkpoint.FOLDER}")
    storage = Storage(head.removesuffix(f"/{checkpoint.FOLDER}") if is_step else url)
    if not storage.exists(RUN):
        raise ConfigError(
            f"run.resume: {url} is neither a run nor a checkpoint of one (RUN/checkpoints/step-N); or say auto or never"
        )
    found = checkpoint.steps(storage)
    if is_step and int(text) not in found:
        raise ConfigError(f"run.resume: no checkpoint {url}; there are: {', '.join(f'step-{n:06d}' for n in found)}")
    return storage, int(text) if is_step else None


def _branch(origin: Storage, step: int, target: Storage, config: Config, facts: dict[str, Any]) -> OpenRun:
    """A new run that begins as a copy of another's up to a checkpoint. Its run.json comes last: a copy that was cut
    short is no run, and is made again."""
    before = Records.open(origin)
    _settings_of(before, config, facts)
    chosen = checkpoint.load(origin, step, before.run_id)
    done = chosen.manifest["next_epoch"]
    _refuse_fewer(config, done, origin)
    lock = _lock(target, make=True)
    try:
        facts = {**facts, "branched_from": f"{origin}/{chosen.name}"}
        records = Records.prepare(target, _name_of(str(target)), config, facts)
        for folder in EPOCH_FOLDERS:
            for name in origin.entries(folder):
                target.write(f"{folder}/{name}", origin.read(f"{folder}/{name}"))
        records.drop_after(done)
        manifest = {**chosen.manifest, "run_id": records.run_id, "mlflow_run_id": None}
        checkpoint.save(target, manifest, chosen.files)
        records.keep([line for line in before.lines if line["epoch"] < done])
        records.note()
        return OpenRun(records, config, checkpoint.load(target, step, records.run_id), lock)
    except BaseException:
        _unlock(lock)
        raise


def _settings_of(records: Records, config: Config, facts: dict[str, Any]) -> Config:
    """The run's own settings, when this config may go on with it.

    Raises:
        ConfigError: it may not; a line for each key that differs.
    """
    if records.about["format"] != FORMAT:
        raise ConfigError(
            f"run.dir: {records.storage} is of format {records.about['format']}, this Tributary reads {FORMAT}: use "
            "the version that wrote it, or choose another run.dir"
        )
    saved = records.config()
    if records.about["config_digest"] != facts["config_digest"]:
        ours, theirs = config.binding(), saved.binding()
        faults = [
            f"{key}: the run in {records.storage} has {theirs[key]!r}, not {ours[key]!r}; use that, or another run.dir"
            for key in ours
            if ours[key] != theirs[key]
        ]
        raise ConfigError("\n".join(faults) or f"run.dir: {records.storage} was begun with other settings")
    if records.about["prompts_sha256"] != facts["prompts_sha256"]:
        raise ConfigError(
            f"prompts.path: {config.prompts.path} (or evaluation.prompts) is not what the run in {records.storage} "
            "began with; put the old file back, or choose another run.dir"
        )
    return saved


def _warn_of_batches(config: Config, begun: Checkpoint, warn: Callable[[str], None]) -> None:
    sizes = begun.manifest["batch_sizes"]
    for key, now, name in (
        ("learner.micro_batch", config.learner.micro_batch, "micro_batch"),
        ("reward.batch", config.reward.batch, "score"),
    ):
        if now and now != sizes.get(name, now):
            warn(f"{key} is {now} now, it was {sizes[name]}: last bits differ from here on from an unbroken run's")


def _refuse_fewer(config: Config, done: int, storage: Storage) -> None:
    if config.train.epochs < done:
        raise ConfigError(f"train.epochs: {config.train.epochs}, but the run in {storage} has done {done} already")


def _name_of(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]


def _lock(storage: Storage, make: bool = False) -> int | None:
    """An advisory lock on a local run; object stores have none."""
    if storage.local is None:
        return None
    try:
        if make:
            storage.local.mkdir(parents=True, exist_ok=True)
        handle = os.open(storage.local / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"run.dir: cannot write {storage}: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        owner = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        raise ConfigError(f"run.dir: {storage} is in use by {owner}; wait for it, or choose another") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return handle


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def in_use(storage: Storage) -> bool:
    """Whether a process is writing this run."""
    if not storage.local or not (storage.local / LOCK).exists():
        return False
    try:
        _unlock(_lock(storage))
    except ConfigError:
        return True
    return False
