"""README.md of an export: the hub's front matter, and what was trained, how well, and how to use it.

It is made to be published: of paths on this machine only the last part is told. No date: equal exports are equal files.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from diffusion.loading import without_weights
from diffusion.locate import BaseModelError
from diffusion.lora_files import AdapterFile
from evaluation.finished_run import Trained
from evaluation.fixed_images import read_images
from evaluation.metrics import mean_of_good, paired_interval
from learner.config import ROOT, resolve
from learner.controller import describe_objective
from records.run_folder import BEFORE, EVALUATION, TRAJECTORIES
from records.storage import StorageError
from reports.usage import usage

EMBEDDED = ROOT / "models" / "shapes"
LICENSES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "runwayml/stable-diffusion-v1-5": "creativeml-openrail-m",
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "google/ddpm-cifar10-32": "apache-2.0",
}
MEASURES = {"reward": "reward", "accuracy": "accuracy", "vendi": "Vendi score", "fid": "FID", "kid": "KID"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PROMPTS = 5  # examples


@dataclass(frozen=True)
class Base:
    """What a card says of the base model: its name, its hub id if it has one, its license."""

    name: str
    hub_id: str | None
    license: str


def base_of(path: str, hub_id: str | None = None) -> Base:
    """Of `model.path`; `hub_id` is said by whoever knows it. The license is that of the model's own card, where one is
    at hand, or known; `other` if not."""
    folder = resolve(path)
    if not folder.is_dir() and HUB_ID.fullmatch(path):
        hub_id = hub_id or path
    known = LICENSES.get(hub_id or "", "other")
    if folder.is_dir() and folder.resolve() == EMBEDDED:
        known = "apache-2.0"
    return Base(hub_id or public(path), hub_id, _card_license(folder / "README.md") or known)


def public(path: str) -> str:
    """A path as it may be published."""
    return Path(path).name if Path(path).expanduser().is_absolute() or path.startswith(("~", ".")) else path


def reward_in_words(trained: Trained) -> str:
    """Its name, and of a sum what it sums."""
    prefix = "reward_mean/"
    parts = sorted({key.removeprefix(prefix) for line in trained.records.lines for key in line if prefix in key})
    return trained.config.reward.name + (f" of {', '.join(parts)}" if parts else "")


def objective_in_words(trained: Trained) -> str:
    """What was trained towards; without its target where the base model, whose size that takes, is not at hand."""
    config = trained.config
    try:
        shape = without_weights(str(resolve(config.model.path)))[0].config
    except BaseModelError:
        return f"{config.objective.kind} ({config.objective.setting}), beta {config.objective.beta:g}"
    return describe_objective(config, int(shape["in_channels"]) * int(shape["sample_size"]) ** 2)


def card(trained: Trained, form: str, adapter: AdapterFile, base: Base, sheets: Sequence[str], version: str) -> str:
    """The page, for an export of `form`; `sheets` are files of contact sheets beside it, of the base model and tuned.

    Raises:
        StorageError: the run's records cannot be read.
    """
    config, fused = trained.config, form == "fused"
    text = config.prompts.path is not None
    tags = ["text-to-image" if text else "unconditional-image-generation", "diffusers"]
    tags += ["stable-diffusion"] * text + ["lora"] * (not fused)
    front: dict[str, Any] = {"license": base.license, "library_name": "diffusers", "pipeline_tag": tags[0]}
    if base.hub_id:
        front |= {"base_model": base.hub_id, "base_model_relation": "finetune" if fused else "adapter"}
    front["tags"] = [*tags, "gflownet", config.objective.kind.replace("_", "-"), "tributary"]
    lora = f"LoRA (rank {adapter.rank}, alpha {adapter.alpha:g})"
    subject = f"{base.name} with a {lora} merged into its U-Net" if fused else f"A {lora} for the U-Net of {base.name}"
    pictures = zip(sheets, ("the base model", "after training"), strict=False)
    parts = [
        f"# {_plain(trained.records.about['name'])}",
        f"{subject}, trained with Tributary {version} on the reward `{_plain(reward_in_words(trained))}`.",
        *(f"![{label}]({file})" for file, label in pictures),
        "## What was trained",
        f"{objective_in_words(trained)}.",
        _control(trained),
        _table(("setting", "value"), _settings(trained, adapter)),
        _prompts(trained),
        "## Figures",
        _figures(trained),
        _evaluated(trained),
        "## How to use it",
        usage(config, form, base.name),
        "## Licenses",
        f"Tributary is under Apache-2.0. The base model's own license applies ({base.license}), and that of the reward "
        "model, if the reward is one.",
        "## Limits",
        "What was rewarded is what was learned, with the reward's blind spots; look at pictures before trusting a "
        "figure. Prompts unlike those above were not trained on, and nothing is said of them here. What the base model "
        "should not be used for, this should not either.",
    ]
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _settings(trained: Trained, adapter: AdapterFile) -> list[tuple[str, str]]:
    config, sampler, given = trained.config, trained.config.sampler, trained.config.objective
    lines = [line for line in trained.records.lines if BEFORE < line["epoch"] < trained.epochs]
    rises = f", rising over the first {given.anneal_fraction:.0%} of the epochs" if given.anneal_fraction else ""
    grid = "" if sampler.grid == "ddim" else f" on the grid {sampler.grid}"
    return [
        ("objective", f"{given.kind}, {given.setting}"),
        ("beta", f"{given.beta:g}{rises}"),
        ("reward", reward_in_words(trained)),
        ("prompts", public(config.prompts.path) if config.prompts.path else "none: the model takes no text"),
        ("trained", f"{trained.epochs} epochs, {sum(line['trajectories'] for line in lines)} trajectories, "
                    f"{trained.step} policy updates"),
        ("adapter", f"rank {adapter.rank}, alpha {adapter.alpha:g}, on {', '.join(adapter.targets)}; "
                    f"learning rate {config.learner.learning_rate:g}"),
        ("sampling", f"{sampler.steps} DDIM steps{grid}, eta {sampler.eta:g}, guidance {sampler.guidance:g}, "
                     f"{config.model.dtype}"),
        ("run", f"{trained.records.run_id}, seed {config.run.seed}, step {trained.step}"),
        ("sha256 of the adapter", adapter.sha256),
    ]  # fmt: skip


def _control(trained: Trained) -> str:
    shuffled = trained.config.train.shuffle_rewards
    return "A control experiment: its rewards were shuffled, so there was nothing to learn." if shuffled else ""


def _prompts(trained: Trained) -> str:
    """Examples, out of the records: the file may be elsewhere, or another by now."""
    storage = trained.records.storage
    names = [name for name in storage.entries(TRAJECTORIES) if name < f"epoch-{trained.epochs:06d}"]
    if not names or trained.config.prompts.path is None:
        return ""
    table = pq.read_table(io.BytesIO(storage.read(f"{TRAJECTORIES}/{names[-1]}")), columns=["prompt"])
    found = list(dict.fromkeys(table["prompt"].to_pylist()))[:PROMPTS]
    return "Some of the prompts:\n\n" + "\n".join(f"* `{_plain(prompt)}`" for prompt in found)


def _figures(trained: Trained) -> str:
    """The fixed images before training and at the last evaluation until the checkpoint."""
    records = trained.records
    there = [epoch for epoch in records.evaluated() if epoch < trained.epochs]
    if len(there) < 2 or there[0] != BEFORE:
        return "The run had not evaluated its fixed images before and after training by then."
    before, after = (read_images(records.images(epoch)) for epoch in (BEFORE, there[-1]))
    pairs = {f"{trained.config.reward.name} (trained on)": (before.rewards, after.rewards)}
    pairs |= {f"{label} (held out)": (was, after.held_out[label]) for label, was in before.held_out.items()}
    rows = []
    for label, (was, now) in pairs.items():
        low, high = paired_interval(was, now)
        means = _number(mean_of_good(was)), _number(mean_of_good(now)), _signed(mean_of_good(now - was))
        rows.append((label, *means, f"{_signed(low)} to {_signed(high)}"))
    return (
        f"{len(after.rewards)} fixed images, the same prompts and noise before training and after {there[-1] + 1} of "
        f"{trained.epochs} epochs; intervals are of the paired difference (bootstrap over images, 95 %).\n\n"
        + _table(("reward", "base model", "tuned", "difference", "95 % interval"), rows)
    )


def _evaluated(trained: Trained) -> str:
    """The newest figures of learner.evaluate up to this step."""
    storage = trained.records.storage
    names = [name for name in storage.entries(EVALUATION) if name.startswith("step-") and name.endswith(".json")]
    steps = sorted(int(name[5:-5]) for name in names if name[5:-5].isdigit() and int(name[5:-5]) <= trained.step)
    if not steps:
        return ""
    name = f"{EVALUATION}/step-{steps[-1]:06d}.json"
    try:
        found = json.loads(storage.read(name))
        rows = []
        for key, label in MEASURES.items():
            if (figure := found.get(key)) is not None:
                value, low, high, base, floor = (
                    _number(figure.get(part)) for part in ("value", "low", "high", "base", "floor")
                )
                rows.append((label, value, f"{low} to {high}" if low and high else "", base, floor))
    except (ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"{name} in {storage} is damaged ({error}): remove it, or evaluate again") from error
    if not rows:
        return ""
    head = ("measure", "tuned", "95 % interval", "base model", "noise alone")
    return (
        f"Evaluated at step {steps[-1]} (`python -m learner.evaluate`); *noise alone* is what the base model moves by, "
        f"or for FID and KID its distance from itself, when only the noise changes:\n\n{_table(head, rows)}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_plain(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """In one line, and no end of a code span."""
    return " ".join(text.split()).replace("`", "'")


def _number(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _signed(value: float) -> str:
    return f"{value:+.3g}" if math.isfinite(value) else ""


def _card_license(file: Path) -> str | None:
    """Of a model card's front matter."""
    try:
        _, front, _ = file.read_text(encoding="utf-8").split("---\n", 2)
        found = yaml.safe_load(front)
        return found["license"] if isinstance(found["license"], str) else None
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
