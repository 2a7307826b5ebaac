"""The adapters that commands are pointed at, of runs or in LoRA files, and the settings that they are judged by."""

from __future__ import annotations

import argparse
import contextlib
import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from diffusion.snapshot import Snapshot, digest
from evaluation.image_sets import ACCURACY, ImageSet
from learner.config import Config, ConfigError, as_arguments, read_config, resolve, saved_config
from learner.config.sections import Evaluation, LoraConfig, Objective, Prompts, SamplerConfig
from learner.prompts import evaluation_prompts, prompts_digest, training_prompts
from records import checkpoint, facts
from records.checkpoint import Checkpoint, CheckpointError
from records.facts import CONFIG, RUN
from records.run_folder import EVALUATION, Records
from records.storage import Storage
from records.words import printable, short

if TYPE_CHECKING:  # torch and diffusers come with it
    from diffusion.lora_files import AdapterFile

LORA = "lora"  # a checkpoint's folder of LoRA files
UNCALIBRATED = "sampler.spread: a run's is measured; give the run's folder, or sampler.kernel=ddim"
OTHER_SEED = 1_000_003  # added to evaluation.seed: noise that no training run evaluates on
SETTING = re.compile(r"[^/:]+=")
SAMPLING = {
    "actors", "gpus", "labels", "chunk_size", "steps", "guidance", "eta", "grid", "kernel", "spread", "noise",
    "adapter",
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A run as it stood at a checkpoint."""

    records: Records
    config: Config
    checkpoint: Checkpoint

    @property
    def epochs(self) -> int:  # that were closed
        return int(self.checkpoint.manifest["next_epoch"])

    @property
    def step(self) -> int:  # policy updates
        return int(self.checkpoint.manifest["step"])

    @property
    def lora_files(self) -> dict[str, bytes]:
        """The adapter's files by name: diffusers' and kohya's, or PEFT's of a model without text."""
        files = self.checkpoint.files.items()
        return {name.removeprefix(f"{LORA}/"): content for name, content in files if name.startswith(f"{LORA}/")}

    def adapter(self) -> AdapterFile:
        """Raises BadAdapter if its file is no LoRA, a CheckpointError if the checkpoint was written of another one."""
        from diffusion import lora_files

        source = f"{self.records.storage}/{self.checkpoint.name}/{LORA}"
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self.lora_files.items():
                (Path(folder) / name).write_bytes(content)
            adapter = replace(lora_files.read(folder), source=source)
        if adapter.sha256 != self.checkpoint.manifest["adapter_sha256"]:
            raise CheckpointError(f"{source} is not the adapter that the run had: its sha256 differs")
        return adapter


def open_trained(url: str, step: int | None, warn: Callable[[str], None]) -> Trained:
    """The run in directory or URL `url` at its newest whole checkpoint, or at that of `step`. `warn` hears of
    checkpoints that are passed over. Raises a StorageError, ConfigError or CheckpointError if there is no run, no such
    checkpoint, or none that is whole."""
    storage = Storage(url)
    records = Records.open(storage, warn)
    config, there = saved_config(records), checkpoint.steps(storage)
    if step is None:
        saved = checkpoint.load_newest(storage, records.run_id, warn)
    else:
        saved = checkpoint.load(storage, step, records.run_id) if step in there else None
    if saved is None:
        steps = f"; there are {', '.join(map(str, there))}" if there else " yet; wait for its first"
        raise CheckpointError(f"{storage} has no checkpoint{'' if step is None else f' of step {step}'}{steps}")
    return Trained(records, config, saved)


def open_adapter(
    name: str, step: int | None, warn: Callable[[str], None]
) -> tuple[Callable[[], AdapterFile], Records | None, Trained | None]:
    """What reads the adapter of a run's folder or URL, of a checkpoint's folder, or of a LoRA's file or folder; the
    run that it lies in; and the run as it stood, if that was named. Raises a ValueError if there is nothing, or
    `step` is of what is no run; and as `open_trained`."""
    if "://" in name or facts.there(Storage(name)):
        trained = open_trained(name, step, warn)
        return trained.adapter, trained.records, trained
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(f"{name}: no such file or folder; give a run's directory, or a LoRA's file or folder")
    if step is not None:
        raise ValueError(f"--step: {name} is no run's directory (it has no {RUN})")

    def read() -> AdapterFile:
        from diffusion import lora_files

        return lora_files.read(path / LORA if (path / LORA).is_dir() else path)

    runs = [storage for folder in path.resolve().parents if facts.there(storage := Storage(str(folder)))]
    return read, Records.open(runs[0], warn) if runs else None, None


@dataclass(frozen=True)
class Target:
    """An adapter to be judged."""

    name: str
    adapter: AdapterFile
    config: Config  # only what judging needs, see _needed
    prompts: tuple[str, ...]
    out: Storage
    place: str  # under `out`, as `file`
    records: Records | None = None  # of the run that it is from
    facts: dict[str, Any] = field(default_factory=dict)  # for the JSON
    exponent: float | None = None  # b, where what it was trained for aims at p_ref exp(b r)
    no_exponent: str = ""  # why there is none

    @property
    def file(self) -> str:
        """Under `out`, without a suffix: judgements by other settings, or of other adapters, have other files."""
        return f"{self.place}-{self.sets()['tuned'].name}"

    def sets(self) -> dict[str, ImageSet]:
        """The adapter's, and its base model's at the same and at other noise."""
        flat, evaluation = self.adapter.flat, self.config.evaluation
        apart = evaluation.model_copy(update={"seed": evaluation.seed + OTHER_SEED})
        tuned = ImageSet(self.config, self.prompts, Snapshot(1, flat, digest(flat)))
        zeros = np.zeros_like(flat)
        base = replace(tuned, snapshot=Snapshot(0, zeros, digest(zeros)))
        other = replace(base, config=self.config.model_copy(update={"evaluation": apart}))
        return {"tuned": tuned, "base": base, "other": other}


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Targets and settings: those have a = after a key, which a path that is here or a URL has not."""
    settings = [text for text in arguments if SETTING.match(text) and not Path(text).exists()]
    return [text for text in arguments if text not in settings], settings


def find(
    names: Sequence[str], overrides: Sequence[str], args: argparse.Namespace, warn: Callable[[str], None]
) -> list[Target]:
    """The targets, checked; nothing is started. Raises a ConfigError with a line for each fault of any of them."""
    targets, faults = [], []
    for name in names:
        try:
            targets.append(_target(name, overrides, args, warn))
            _check(targets[-1], warn)
        except (OSError, ValueError) as error:
            faults.append(str(error) if name in str(error) else f"{name}: {error}")
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return targets


def _target(name: str, overrides: Sequence[str], args: argparse.Namespace, warn: Callable[[str], None]) -> Target:
    """By its run's settings, or those of --config, or the demo's, with options and overrides."""
    read_adapter, run, trained = open_adapter(name, args.step, warn)
    options = {"model.path": args.base, "evaluation.images": args.images, "evaluation.prompts": args.prompts}
    settings = [*(f"{key}={value}" for key, value in options.items() if value is not None), *overrides]
    if run and not args.config:
        config, faults = read_config(saved_config(run).model_dump(mode="json"), settings)
        faults = faults or unconfirmed(config, {text.partition("=")[0].strip() for text in settings}, run)
    else:
        config, faults = read_config(args.config, settings)
    if faults := faults or ["evaluation.images: 0; say how many with --images"] * (not config.evaluation.images):
        raise ConfigError("\n".join(faults))
    adapter, prompts = read_adapter(), tuple(evaluation_prompts(config))
    judged = adapter, _needed(config, adapter, prompts), prompts
    exponent, why = _tilt(config, run)
    if trained is None:
        source = Path(adapter.source)
        out, folder = (args.out, "") if args.out else (source.parent, f"{EVALUATION}/")  # within: no link leads out
        shown, place = _shown(Path(name).resolve().stem), f"{folder}{source.stem}"
        return Target(shown, *judged, Storage(str(out)), place, exponent=exponent, no_exponent=why)
    records, step = trained.records, trained.step
    lines = [line for line in records.lines if 0 <= line["epoch"] < trained.epochs]
    cluster = records.about.get("cluster", {})
    known = {
        "run_id": records.run_id, "step": step, "epochs_done": trained.epochs,
        "trajectories_trained": trained.checkpoint.manifest["ledger"]["totals"].get("trained"),
        "seconds": sum(line["seconds"] for line in lines) if len(lines) == trained.epochs else None,
        "gpus": cluster.get("GPU", 0), "cpus": cluster.get("CPU"),
    }  # fmt: skip
    written, name = f"{EVALUATION}/step-{step:06d}", _shown(records.about["name"])
    return Target(name, *judged, records.storage, written, records, known, exponent, why)


def _tilt(config: Config, run: Records | None) -> tuple[float | None, str]:
    """As by_name.tilt, of a run or for the settings' own model."""
    from diffusion.parts import latent_shape
    from learner.objectives.by_name import tilt

    exponent, why = tilt(config, 1)  # nothing is read where D does not matter
    dimensions = run.about.get("dimensions") if run else None
    if exponent is None or exponent == tilt(config, 2)[0]:
        return exponent, why
    if not dimensions:
        dimensions = prod(latent_shape(str(resolve(config.model.path)), config.model.pixels))
    return tilt(config, int(dimensions))


def _shown(name: str) -> str:
    return short(printable(name), 100)


def unconfirmed(config: Config, given: Collection[str], run: Records) -> list[str]:
    """What only the run's files name and the command does not: they may be somebody else's. They run no code of the
    user's, and have no file read for prompts but the one that the run knows the content of."""
    own = {key: value for key, value in config.own_code.items() if key not in given}
    if own:
        place = f"{run.storage}/{CONFIG}"
        asked = " (and no judge behind a URL is asked)" if "remote" in str(own) else ""
        said = f"{', '.join(own)}: code that only {place} names is not run{asked}"
        return [f"{said}; if it is yours, give {as_arguments(own)}"]
    key = "evaluation.prompts" if config.evaluation.prompts else "prompts.path"
    if key in given:
        return []
    began = saved_config(run)
    if prompts_digest([*training_prompts(began), *evaluation_prompts(began)]) != run.about["prompts_sha256"]:
        return [f"{key}: {config.flat()[key]} does not hold the prompts that the run began with; give --prompts FILE"]
    return []


def _needed(config: Config, adapter: AdapterFile, prompts: Sequence[str]) -> Config:
    """What judging needs of the settings, the others at their defaults: runs of different objectives are judged by the
    same actors. Where every prompt is of the shapes world, its accuracy is a held-out reward too."""
    from rewards import judges

    evaluation = config.evaluation
    with contextlib.suppress(ValueError):
        judges.check([ACCURACY], "pixels", None, prompts)
        if ACCURACY not in judges.labels(evaluation.held_out):
            evaluation = evaluation.model_copy(update={"held_out": (*evaluation.held_out, ACCURACY)})
    lora = LoraConfig(rank=adapter.rank, alpha=adapter.alpha, targets=_targets(adapter))
    return drawing(config, prompts, evaluation, lora)


def drawing(config: Config, prompts: Sequence[str], evaluation: Evaluation, adapter: LoraConfig) -> Config:
    """What drawing these prompts and scoring need of the settings. Of the objective it is the window, where noise or
    the adapter end with it."""
    sampler, objective = SamplerConfig(**config.sampler.model_dump(include=SAMPLING)), Objective()
    if "window" in (sampler.noise, sampler.adapter):
        first, end = config.objective.span(sampler.steps)
        objective = Objective(window=(first, end - 1))
    return Config(
        run=config.run.model_copy(update={"seed": 0, "dir": None, "root": None, "resume": "auto"}),
        model=config.model, prompts=Prompts(path=tuple(dict.fromkeys(prompts)) if any(prompts) else None),
        reward=config.reward, evaluation=evaluation.model_copy(update={"prompts": None}), sampler=sampler,
        objective=objective, lora=adapter,
    )  # fmt: skip


def _targets(adapter: AdapterFile) -> Literal["attention", "all"]:
    ends = "conv1", "time_emb_proj", "ff.net.2"
    return "all" if any(module.endswith(ends) for module in adapter.modules) else "attention"


def _check(target: Target, warn: Callable[[str], None]) -> None:
    """Raises a ValueError for what would otherwise fail only after actors are up: a damaged base model, or a
    LoRA of another; a reward, held-out rewards or features that cannot be had. Says which prompts are cut."""
    from diffusion import lora, lora_files
    from diffusion.locate import is_unconditional
    from diffusion.parts import cut_prompts, without_weights
    from diffusion.rehearsal import check_model
    from rewards import judges, registry

    config, adapter, sampler = target.config, target.adapter, target.config.sampler
    path = str(resolve(config.model.path))
    grid = sampler.steps, sampler.eta, sampler.grid, config.model.pixels
    check_model(path, *grid, sampler.kernel, sampler.spread)
    if config.uncalibrated:
        raise ValueError(UNCALIBRATED)
    if not is_unconditional(path) and (said := cut_prompts(path, target.prompts, config.model.text_tokens)):
        warn(f"{target.name}: {said}")
    unet, _ = without_weights(path)
    lora_files.require_fit(unet, adapter)
    ends = tuple(f".{module}" for module in lora.TARGETS[config.lora.targets])
    if set(adapter.modules) != {name for name, _ in unet.named_modules() if f".{name}".endswith(ends)}:
        raise lora_files.BadAdapter(
            f"{adapter.source} adapts other modules than all attention projections ({', '.join(lora.ATTENTION)}), or "
            "all that lora.targets=all has: learner.generate draws with it, samplers do not"
        )
    reward, evaluation = config.reward, config.evaluation
    target.out.exists(f"{target.file}.json")  # no link leads out
    registry.check(reward.name, reward.weights, reward.options, target.prompts)
    judges.check(evaluation.held_out, evaluation.features, evaluation.clip, target.prompts)
