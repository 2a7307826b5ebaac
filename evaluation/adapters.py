"""The adapters that a command is asked to judge, of runs or from LoRA files, with the settings to judge them by."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion.snapshot import Snapshot, digest
from evaluation.finished_run import open_trained
from evaluation.image_sets import ACCURACY, ImageSet
from learner.config import Config, ConfigError, read_config, resolve
from learner.config.sections import LoraConfig, SamplerConfig
from learner.prompts import evaluation_prompts
from records.run_folder import EVALUATION, RUN, Records
from records.storage import Storage

if TYPE_CHECKING:
    from diffusion.lora_files import AdapterFile

OTHER_SEED = 1_000_003  # added to evaluation.seed: noise that no training run evaluates on
SETTING = re.compile(r"[^/:]+=")


@dataclass(frozen=True)
class Target:
    """An adapter to be judged."""

    name: str
    adapter: AdapterFile
    config: Config  # only what judging needs, see _target
    prompts: tuple[str, ...]
    out: Storage
    file: str  # under `out`, without its suffix
    records: Records | None = None  # of the run that it is from
    facts: dict[str, Any] = field(default_factory=dict)  # for the JSON

    def sets(self) -> dict[str, ImageSet]:
        """The adapter's, and its base model's at the same and at other noise."""
        seed, flat = self.config.evaluation.seed, self.adapter.flat
        zeros = np.zeros_like(flat)
        return {
            name: ImageSet(self.config, self.prompts, Snapshot(version, adapter, digest(adapter)), noise)
            for name, version, adapter, noise in (
                ("tuned", 1, flat, seed), ("base", 0, zeros, seed), ("other", 0, zeros, seed + OTHER_SEED)
            )
        }  # fmt: skip


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Targets and settings: those have a = after a key, which a path that is here or a URL has not."""
    settings = [text for text in arguments if SETTING.match(text) and not Path(text).exists()]
    return [text for text in arguments if text not in settings], settings


def find(names: Sequence[str], overrides: Sequence[str], args: argparse.Namespace) -> list[Target]:
    """The targets, checked; nothing is started.

    Raises:
        ConfigError: a line for each fault of any of them.
    """
    targets, faults = [], []
    for name in names:
        try:
            target = _of_lora(name, overrides, args) if _is_lora(name) else _of_run(name, overrides, args)
            _check(target)
        except (OSError, ValueError) as error:
            faults.append(str(error) if name in str(error) else f"{name}: {error}")
        else:
            targets.append(target)
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return targets


def _is_lora(name: str) -> bool:
    """A run's own URL may be anything; a LoRA is a local path that is no run."""
    path = Path(name).expanduser()
    return path.is_file() or (path.is_dir() and not (path / RUN).is_file() and any(path.glob("*.safetensors")))


def _of_run(name: str, overrides: Sequence[str], args: argparse.Namespace) -> Target:
    storage = Storage(name)
    if not storage.exists(RUN):
        raise ConfigError(f"no run is here ({RUN} is missing), nor a LoRA (*.safetensors)")
    trained = open_trained(name, args.step, lambda text: print(text, file=sys.stderr))
    tree, records = trained.config.model_dump(mode="json"), trained.records
    config = _settings(partial(read_config, tree), overrides, args)
    lines = [line for line in records.lines if 0 <= line["epoch"] < trained.epochs]
    cluster = records.about.get("cluster", {})
    facts = {
        "run_id": records.run_id, "step": trained.step, "epochs_done": trained.epochs,
        "trajectories_trained": lines[-1]["trajectories_trained"] if lines else 0,
        "seconds": sum(line["seconds"] for line in lines), "gpus": cluster.get("GPU", 0), "cpus": cluster.get("CPU"),
    }  # fmt: skip
    file = f"{EVALUATION}/step-{trained.step:06d}"
    return _target(records.about["name"], trained.adapter(), config, storage, file, records, facts)


def _of_lora(name: str, overrides: Sequence[str], args: argparse.Namespace) -> Target:
    config = _settings(partial(read_config, args.config), overrides, args)
    from diffusion import lora_files

    adapter = lora_files.read(name)
    file = Path(adapter.source)
    title = file.stem if Path(name).is_file() else Path(name).resolve().name
    return _target(title, adapter, config, Storage(str(args.out or file.parent / EVALUATION)), file.stem)


def _settings(
    read: Callable[[Sequence[str]], tuple[Config, list[str]]], overrides: Sequence[str], args: argparse.Namespace
) -> Config:
    """What `read` makes of options and overrides."""
    options = {"model.path": args.base, "evaluation.images": args.images, "evaluation.prompts": args.prompts}
    config, faults = read([*(f"{key}={value}" for key, value in options.items() if value is not None), *overrides])
    if not config.evaluation.images:
        faults = [*faults, "evaluation.images: 0; say how many with --images"]
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def _target(name: str, adapter: AdapterFile, config: Config, *of: Any) -> Target:
    """With what judging needs of the settings, the others at their defaults: runs of different objectives are judged by
    the same actors. Where every prompt is of the shapes world, its accuracy is a held-out reward too."""
    from rewards import judges

    prompts, evaluation = tuple(evaluation_prompts(config)), config.evaluation
    with contextlib.suppress(ValueError):
        judges.check([ACCURACY], "pixels", None, prompts)
        if ACCURACY not in judges.labels(evaluation.held_out):
            evaluation = evaluation.model_copy(update={"held_out": (*evaluation.held_out, ACCURACY)})
    sampling = {"actors", "gpus", "labels", "chunk_size", "steps", "guidance", "eta", "grid"}
    needed = Config(
        run=config.run.model_copy(update={"seed": 0, "dir": None, "root": None, "resume": "auto"}),
        model=config.model, reward=config.reward, evaluation=evaluation,
        sampler=SamplerConfig(**config.sampler.model_dump(include=sampling)),
        lora=LoraConfig(rank=adapter.rank, alpha=adapter.alpha),
    )  # fmt: skip
    return Target(name, adapter, needed, prompts, *of)


def _check(target: Target) -> None:
    """Everything that would otherwise fail only after actors are up.

    Raises:
        BadAdapter: the LoRA is of another base model.
        ConfigError: reward, held-out rewards or features cannot be had.
    """
    from diffusion import lora, lora_files
    from diffusion.loading import without_weights
    from rewards import judges, registry

    unet, _ = without_weights(str(resolve(target.config.model.path)))
    lora_files.require_fit(unet, target.adapter)
    ends = tuple(f".{module}" for module in lora.TARGETS)
    usual = {name for name, _ in unet.named_modules() if name.endswith(ends)}
    if set(target.adapter.modules) != usual:
        raise lora_files.BadAdapter(
            f"{target.adapter.source} adapts {len(target.adapter.modules)} modules, samplers adapt the {len(usual)} "
            f"attention projections ({', '.join(lora.TARGETS)}): learner.generate draws with it, but it is not judged"
        )
    reward, evaluation, prompts, faults = target.config.reward, target.config.evaluation, target.prompts, []
    for check in (
        partial(registry.check, reward.name, reward.weights, reward.options, prompts, backend=reward.backend),
        partial(judges.check, evaluation.held_out, evaluation.features, evaluation.clip, prompts),
    ):
        try:
            check()
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("; ".join(faults))
