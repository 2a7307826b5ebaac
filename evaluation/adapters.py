"""What a command is asked to judge: adapters, of runs or from LoRA files, with the settings to judge them by."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from diffusion import lora, lora_files
from diffusion.loading import without_weights
from diffusion.locate import BaseModelError
from diffusion.lora_files import AdapterFile, BadAdapter
from diffusion.snapshot import Snapshot, digest
from evaluation import image_sets
from evaluation.finished_run import open_trained
from evaluation.image_sets import ImageSet
from learner.config import DEFAULT_CONFIG, Config, ConfigError, build_config, resolve
from learner.prompts import evaluation_prompts
from records.checkpoint import CheckpointError
from records.run_folder import EVALUATION, RUN, Records
from records.storage import Storage, StorageError
from rewards import judges, registry

OTHER_SEED = 1_000_003  # added to evaluation.seed: noise that no training run evaluates on
SETTING = re.compile(r"[^/:]+=")
BAD_INPUT = (BadAdapter, BaseModelError, CheckpointError, ConfigError, StorageError)


@dataclass(frozen=True)
class Target:
    """An adapter to be judged."""

    name: str
    adapter: AdapterFile
    config: Config  # judging.settings
    prompts: tuple[str, ...]
    out: Storage
    file: str  # under `out`, without its suffix
    records: Records | None = None  # of the run that it is from
    facts: dict[str, Any] = field(default_factory=dict)  # for the JSON

    def sets(self) -> dict[str, ImageSet]:
        """The adapter's, and its base model's at the same and at other noise."""
        seed, flat = self.config.evaluation.seed, self.adapter.flat
        tuned = Snapshot(1, flat, digest(flat))
        nothing = np.zeros_like(flat)
        base = Snapshot(0, nothing, digest(nothing))
        return {
            "tuned": ImageSet(self.config, self.prompts, tuned, seed),
            "base": ImageSet(self.config, self.prompts, base, seed),
            "other": ImageSet(self.config, self.prompts, base, seed + OTHER_SEED),
        }


def split(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Targets and settings: those have a = after a key, which a path that is here or a URL has not."""
    settings = [one for one in given if SETTING.match(one) and not Path(one).exists()]
    return [one for one in given if one not in settings], settings


def find(given: Sequence[str], overrides: Sequence[str], args: argparse.Namespace) -> list[Target]:
    """The targets, checked; nothing is started.

    Raises:
        ConfigError: a line for each fault of any of them.
    """
    found, faults = [], []
    for name in given:
        try:
            target = _of_lora(name, overrides, args) if _is_lora(name) else _of_run(name, overrides, args)
            _check(target)
        except BAD_INPUT as error:
            faults.append(str(error) if name in str(error) else f"{name}: {error}")
        else:
            found.append(target)
    if faults:
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return found


def _is_lora(name: str) -> bool:
    """A run's own URL may be anything; a LoRA is a local path that is no run."""
    path = Path(name).expanduser()
    return path.is_file() or (path.is_dir() and not (path / RUN).is_file() and any(path.glob("*.safetensors")))


def _of_run(name: str, overrides: Sequence[str], args: argparse.Namespace) -> Target:
    storage = Storage(name)
    if not storage.exists(RUN):
        raise ConfigError(f"no run is here ({RUN} is missing), nor a LoRA (*.safetensors)")
    trained = open_trained(name, args.step, lambda text: print(text, file=sys.stderr))
    adapter, records = trained.adapter(), trained.records
    config, prompts = _settings(trained.config.model_dump(mode="json"), overrides, args, adapter)
    lines = [line for line in records.lines if 0 <= line["epoch"] < trained.epochs]
    cluster = records.about.get("cluster", {})
    facts = {
        "run_id": records.run_id, "step": trained.step, "epochs_done": trained.epochs,
        "trajectories_trained": lines[-1]["trajectories_trained"] if lines else 0,
        "seconds": sum(line["seconds"] for line in lines), "gpus": cluster.get("GPU", 0), "cpus": cluster.get("CPU"),
    }  # fmt: skip
    file = f"{EVALUATION}/step-{trained.step:06d}"
    return Target(records.about["name"], adapter, config, prompts, storage, file, records, facts)


def _of_lora(name: str, overrides: Sequence[str], args: argparse.Namespace) -> Target:
    adapter = lora_files.read(name)
    try:
        tree = yaml.safe_load((args.config or DEFAULT_CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: cannot read {args.config}: {' '.join(str(error).split())}") from error
    config, prompts = _settings(tree, overrides, args, adapter)
    file = Path(adapter.source)
    title = file.stem if Path(name).is_file() else Path(name).resolve().name
    out = Storage(str(args.out or file.parent / EVALUATION))
    return Target(title, adapter, config, prompts, out, file.stem)


def _settings(
    tree: dict[str, Any], overrides: Sequence[str], args: argparse.Namespace, adapter: AdapterFile
) -> tuple[Config, tuple[str, ...]]:
    short = {"model.path": args.base, "evaluation.images": args.images, "evaluation.prompts": args.prompts}
    given = [f"{key}={value}" for key, value in short.items() if value is not None]
    config, faults = build_config(tree, [*given, *overrides], "the config")
    if not config.evaluation.images:
        faults = [*faults, "evaluation.images: 0; say how many with --images"]
    if faults:
        raise ConfigError("\n".join(faults))
    prompts = tuple(evaluation_prompts(config))
    return image_sets.settings(config, prompts, adapter.rank, adapter.alpha), prompts


def _check(target: Target) -> None:
    """What would otherwise fail only after actors are up.

    Raises:
        BadAdapter: the LoRA is of another base model.
        ConfigError: reward, held-out rewards or features cannot be had.
    """
    unet, _ = without_weights(str(resolve(target.config.model.path)))
    lora_files.require_fit(unet, target.adapter)
    usual = {name for name, _ in unet.named_modules() if name.endswith(tuple(f".{one}" for one in lora.TARGETS))}
    if set(target.adapter.modules) != usual:
        raise BadAdapter(
            f"{target.adapter.source} adapts {len(target.adapter.modules)} modules, samplers adapt the {len(usual)} "
            f"attention projections ({', '.join(lora.TARGETS)}): learner.generate draws with it, but it is not judged"
        )
    reward, evaluation = target.config.reward, target.config.evaluation
    faults = []
    for check in (
        lambda: registry.check(
            reward.name, reward.weights, reward.options, target.prompts, backend=reward.backend
        ),
        lambda: judges.check(evaluation.held_out, evaluation.features, evaluation.clip, target.prompts),
    ):  # fmt: skip
        try:
            check()
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("; ".join(faults))
