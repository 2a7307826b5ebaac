"""Which run a command means: a new one, or one to go on with; and whether it may. The same command given again goes on
where the run stopped, and does nothing where it is done."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.config import Config, ConfigError, config_yaml, given_config, raise_faults, settled
from learner.config.schema import LOWERED
from learner.prompts import prompts_digest
from learner.update import NonFiniteGradient
from records import checkpoint, environment, facts
from records.checkpoint import Checkpoint
from records.facts import Warn
from records.run_folder import BEFORE, CONFIG, FORMAT, Records
from records.storage import Storage, StorageError


@dataclass
class OpenRun:
    """A run that this process alone may write until it is closed, and the checkpoint to go on from, if any."""

    records: Records
    given: Config  # as the command says
    config: Config  # with what is measured before training, once it is
    as_begun: Config  # with what it leaves open as the run began
    checkpoint: Checkpoint | None
    close: Callable[[], None]

    def settle(self, **known: Any) -> None:
        """Keep in run.json what was measured before training (records/shapes.py: spread, settled), and go by it from
        now on."""
        self.records.note(**known)
        self.config, self.as_begun = (settled(config, self.records) for config in (self.config, self.as_begun))


def find(config: Config, source: Path, prompts: Sequence[str]) -> Storage:
    """Where the run lives or will live; nothing is made. `source` is the config file, which names new runs. Raises a
    ConfigError where run.dir cannot be followed, or the run there has other settings or prompts."""
    wanted = _facts(config, prompts)
    if config.run.dir:
        storage = Storage(_absolute(config.run.dir, config))
        try:
            if storage.local and storage.local.is_file():
                raise ConfigError(f"run.dir: {storage} is a file")
        except OSError as error:  # too long a name
            raise ConfigError(f"run.dir: {storage!s:.200}: {error.strerror}") from error
        if not facts.there(storage):
            _require_free(storage, config)
        elif config.run.resume == "never":
            raise ConfigError(f"run.dir: {storage} already holds a run; choose another, or run.resume=auto to go on")
    else:
        storage = (config.run.resume == "auto" and _newest_unfinished(config, wanted)) or _new_folder(config, source)
    if facts.there(storage):
        _settings_of(records := Records.open(storage), config, wanted)
        if not checkpoint.steps(storage) and any(line["epoch"] >= 0 for line in records.lines):
            raise ConfigError(
                f"run.dir: {storage} has records of epochs, and none of their checkpoints: put checkpoints/ back from "
                "a copy, or choose another run.dir"
            )
        done = max(checkpoint.steps(storage), default=0) // config.steps_per_epoch
        if config.train.epochs < done:
            raise ConfigError(f"train.epochs: {config.train.epochs}, but the run in {storage} has done {done} already")
    return storage


def open_run(config: Config, source: Path, prompts: Sequence[str], warn: Warn) -> OpenRun:
    """The run that the config means; its folder is made if need be. Raises as `find`, a CheckpointError where none of
    the run's checkpoints is whole, and a StorageError where another process writes the run."""
    storage, wanted = find(config, source, prompts), _facts(config, prompts)
    with contextlib.ExitStack() as undo:
        undo.enter_context(storage.lock())
        if facts.there(storage):
            storage.tidy()
        else:
            Records.create(storage, Path(str(storage)).name, config_yaml(config), wanted)
        records = Records.open(storage, warn)
        saved = _settings_of(records, config, wanted)
        newest, as_begun = checkpoint.load_newest(storage, records.run_id, warn), config
        changes = [
            {"epoch": newest.manifest["next_epoch"] if newest else 0, "key": key, "before": before, "after": after}
            for key, before, after in _lowered(config, saved)
        ]
        for change in changes:
            warn(f"{change['key']} is {change['after']:g} now, it was {change['before']:g} (noted in run.json)")
        if newest:
            as_begun = _as_begun(config, saved, newest.manifest, warn)
            checkpoint.drop_after(storage, newest.manifest["step"], records.steps)
        records.drop_after(newest.manifest["next_epoch"] if newest else BEFORE)
        changes = [*records.about.get("changes", ()), *changes]  # what may change may have
        records.save_settings(config_yaml(config), config_digest=wanted["config_digest"], changes=changes)
        now, as_begun = settled(config, records), settled(as_begun, records)
        return OpenRun(records, config, now, as_begun, newest, undo.pop_all().close)


def _require_free(storage: Storage, config: Config) -> None:
    """Raises a ConfigError if there is something in this folder without a run: it is somebody's. A run of these very
    settings that was killed as it was begun has left those."""
    there = storage.strangers()
    if there and not (there == [CONFIG] and storage.read(CONFIG) == config_yaml(config)):
        raise ConfigError(
            f"run.dir: {storage} holds {there[0]} and no run of this Tributary; choose an empty or new folder"
        )


def _facts(config: Config, prompts: Sequence[str]) -> dict[str, Any]:
    """What a run and whoever goes on with it must share."""
    return {"format": FORMAT, "config_digest": config.digest(), "prompts_sha256": prompts_digest(prompts)}


def _absolute(url: str, config: Config) -> str:
    """Relative ones are in run.root, else here; in a submitted Ray job, whose folder is deleted, in the user's home."""
    if "://" in url:
        return url
    root = config.run.root or str(Path.home() / "tributary" if environment.in_submitted_job() else Path.cwd())
    if "://" in root and not url.startswith(("/", "~")):
        return f"{root.rstrip('/')}/{url}"
    return str(Path(root).expanduser().absolute() / Path(url).expanduser())


def _newest_unfinished(config: Config, wanted: dict[str, Any]) -> Storage | None:
    """Of the runs in runs/ with these very settings and prompts, the newest that is not done and not in use."""
    folder, runs = Storage(_absolute("runs", config)), []
    for name in folder.entries():
        storage = Storage(f"{folder}/{name}")
        with contextlib.suppress(StorageError):  # no run, or nothing says which
            about = facts.about(storage, lambda text: None)
            if {**wanted, "finished": False}.items() <= about.items() and not storage.in_use():
                runs.append((about["created"], name))
    return Storage(f"{folder}/{max(runs)[1]}") if runs else None


def _new_folder(config: Config, source: Path) -> Storage:
    base = _absolute(f"runs/{source.stem}-{time.strftime('%Y%m%d-%H%M%S')}", config)
    storage, number = Storage(base), 2
    while storage.strangers():
        storage, number = Storage(f"{base}-{number}"), number + 1
    return storage


def _settings_of(records: Records, config: Config, wanted: dict[str, Any]) -> Config:
    """The run's own settings, when this config may go on with it. Raises a ConfigError, a line for each key that
    differs, where it may not."""
    storage, about, other = records.storage, records.about, "or choose another run.dir"
    if (written_as := about["format"]) != FORMAT:
        raise ConfigError(f"run.dir: {storage} is of format {written_as}; use the version that wrote it, {other}")
    saved = given_config(records)
    ours, theirs = config.binding(), saved.binding()
    lower = [key for key, *_ in _lowered(config, saved)] if about.get("failure") == NonFiniteGradient.__name__ else ()
    faults = [
        f"{key}: the run in {storage} has {theirs[key]!r:.200}, not {ours[key]!r:.200}; use that, or another run.dir"
        for key in ours
        if ours[key] != theirs[key] and key not in lower
    ]
    if not faults and about["prompts_sha256"] != wanted["prompts_sha256"]:
        faults = [f"prompts.path, evaluation.prompts: the run in {storage} began with others; put them back, {other}"]
    raise_faults(faults)
    return saved


def _lowered(config: Config, saved: Config) -> list[tuple[str, float, float]]:
    """Of what a gradient that is not finite asks to lower: key, the run's value and this one."""
    ours, theirs = config.binding(), saved.binding()
    return [(key, theirs[key], ours[key]) for key in LOWERED if ours[key] < theirs[key]]


def _as_begun(config: Config, saved: Config, manifest: dict[str, Any], warn: Warn) -> Config:
    """With the learner ranks and batch sizes that the run began with, where they are open: other sums and products have
    other last bits. Warns of those that are set anew, and of epochs that change beta's schedule."""
    sizes, learner, reward = manifest["batch_sizes"], config.learner, config.reward
    annealed = manifest["next_epoch"] and config.objective.anneal_fraction
    for key, now, then in (
        ("learner.micro_batch", learner.micro_batch, sizes["micro_batch"]),
        ("reward.batch", reward.batch, sizes.get("score")),
        ("train.epochs", annealed and config.train.epochs, saved.train.epochs),
    ):
        if now and then and now != then:
            warn(f"{key} is {now} now, it was {then}: from here on the result differs from an unbroken run's")
    mine = {"micro_batch": learner.micro_batch or sizes["micro_batch"], "ranks": manifest["ranks"]}
    reward = reward.model_copy(update={"batch": reward.batch or sizes.get("score")})
    return config.model_copy(update={"learner": learner.model_copy(update=mine), "reward": reward})
