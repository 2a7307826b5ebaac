"""The configuration: its contradictions, and how YAML and `key=value` become one. The keys are in sections.py.

Errors are collected and reported together, each naming its key and, for a misspelt one, the nearest known key.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from diffusion.rollout import RolloutSettings
from diffusion.transitions import select
from learner import sections
from learner.objectives import OBJECTIVES
from learner.sections import Section

CONFIG_VERSION = 2  # of the keys and their meaning
ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = ROOT / "configs" / "shapes_alignment.yaml"


class ConfigError(ValueError):
    """Everything wrong with a configuration, one line a fault."""


# What a resumed run may set anew: on CPU none of it changes a bit of the result, but train.epochs, which prolongs it,
# and the batches that must fit into memory, which change last bits (it says so): a small GPU must not strand a run.
FREE = (
    "run.dir", "run.root", "run.resume", "run.keep_checkpoints", "run.thumbnail_pixels", "run.chunk_attempts",
    "run.ready_seconds", "run.chunk_seconds", "run.train_seconds", "run.autoscale", "sampler.actors",
    "sampler.gpus", "sampler.labels", "reward.actors", "reward.gpus", "reward.labels", "reward.quarantine_limit",
    "learner.gpus", "learner.labels", "learner.attempts", "train.epochs", "train.stop_on_collapse",
    "learner.micro_batch", "reward.batch", "mlflow.enabled", "mlflow.uri", "mlflow.experiment", "mlflow.finish_seconds",
    "mlflow.group", "mlflow.registered_model",
)  # fmt: skip


class Config(Section):
    config_version: int = Field(CONFIG_VERSION, description="version of these keys; set only by the program")
    run: sections.Run = sections.Run()
    model: sections.Model = sections.Model()
    prompts: sections.Prompts = sections.Prompts()
    sampler: sections.SamplerConfig = sections.SamplerConfig()
    reward: sections.RewardConfig = sections.RewardConfig()
    lora: sections.LoraConfig = sections.LoraConfig()
    flow: sections.FlowConfig = sections.FlowConfig()
    learner: sections.LearnerConfig = sections.LearnerConfig()
    objective: sections.Objective = sections.Objective()
    train: sections.Train = sections.Train()
    evaluation: sections.Evaluation = sections.Evaluation()
    mlflow: sections.Mlflow = sections.Mlflow()

    def flat(self) -> dict[str, Any]:
        """Every setting as `section.key`, JSON types."""
        tree = self.model_dump(mode="json")
        return {f"{section}.{key}": value for section in _sections() for key, value in tree[section].items()}

    def binding(self) -> dict[str, Any]:
        """The settings that a resumed run must share with its beginning: all but FREE."""
        return {key: value for key, value in self.flat().items() if key not in FREE}

    def digest(self) -> str:
        """sha256 of the binding settings: equal runs have equal ones."""
        return hashlib.sha256(json.dumps(self.binding(), sort_keys=True).encode()).hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        """Policy optimizer steps."""
        return self.train.updates_per_epoch + self.train.replay_updates

    @property
    def kept_epochs(self) -> int:
        """Epochs of rollouts that a learner keeps to train on again."""
        fits = self.flow.fit_steps or self.flow.warmup_steps
        return max(self.flow.replay_epochs if fits else 0, self.train.replay_epochs if self.train.replay_updates else 0)

    def contradictions(self) -> Iterator[str]:
        """What no single key can show to be wrong."""
        ranks = (self.learner.ranks or 1) if self.run.runner == "ray" else 1
        chunk, epoch, updates = self.sampler.chunk_size, self.train.trajectories, self.train.updates_per_epoch
        if epoch % chunk:
            yield f"sampler.chunk_size: {chunk} does not divide train.trajectories {epoch}"
        elif (epoch // chunk) % (updates * ranks):
            yield (
                f"train.updates_per_epoch: the epoch's {epoch // chunk} chunks (of sampler.chunk_size {chunk}) "
                f"do not divide evenly among {updates} updates of {ranks} learner ranks; "
                f"make train.trajectories a multiple of {chunk * updates * ranks}"
            )
        if chunk % self.prompts.per_prompt:
            yield f"prompts.per_prompt: {self.prompts.per_prompt} does not divide sampler.chunk_size {chunk}"
        if self.objective.forward_looking_from >= self.sampler.steps:
            yield f"objective.forward_looking_from: must be below sampler.steps {self.sampler.steps}"
        if self.train.shuffle_rewards and self.sampler.transitions != "all":
            yield "train.shuffle_rewards: only with sampler.transitions=all (other states have no reward to swap)"
        if self.train.shuffle_rewards and chunk == 1:
            yield "train.shuffle_rewards: needs a sampler.chunk_size above 1"
        yield from self._contradictions_of_objective()
        if self.evaluation.images % chunk:
            yield f"evaluation.images: {self.evaluation.images} is not a multiple of sampler.chunk_size {chunk}"

    def _contradictions_of_objective(self) -> Iterator[str]:
        given, objective = self.objective, OBJECTIVES[self.objective.kind]
        for key in ("replay_updates", "max_staleness"):
            if getattr(self.train, key) and not objective.off_policy:
                allowed = ", ".join(kind for kind, other in OBJECTIVES.items() if other.off_policy)
                yield (
                    f"train.{key}: {given.kind} learns from the ratio of the current policy to the one that "
                    f"sampled, which gives no gradient outside 1 +- objective.clip_range {given.clip_range:g} and does "
                    f"not weigh the states that were met: trajectories of earlier policies are out of its reach; use "
                    f"train.{key}=0, or one of {allowed}"
                )
        if (self.flow.fit_steps or self.flow.warmup_steps) and not objective.fits_flow:
            allowed = ", ".join(kind for kind, other in OBJECTIVES.items() if other.fits_flow)
            yield (
                f"flow.fit_steps, flow.warmup_steps: {given.kind} has no flow network that could be fitted alone; "
                f"set both to 0, or use one of {allowed}"
            )
        widths = self.flow.widths
        if objective.flow and not _groups_fit(widths):
            yield f"flow.widths: {list(widths)} cannot be normalised in groups; use widths such as [32, 64]"
        if objective.flow == "gradient" and self.flow.stem_stride != 1:
            yield f"flow.stem_stride: {given.kind} has a flow network of full size; set it to 1"
        if given.kind == "residual_nabla_db_no_flow" and given.forward_looking == "none":
            yield f"objective.forward_looking: none leaves {given.kind} nothing to learn from; use base or snapshot"
        if objective.reward_gradients and self.train.shuffle_rewards:
            yield f"train.shuffle_rewards: {given.kind} learns from gradients of rewards, which cannot change places"
        if given.kind == "dag_kl":
            first = select(
                self.sampler.transitions, self.sampler.transition_fraction,
                self.sampler.steps - (given.last_transition == "skip"), 0, 0, [0],
            )  # fmt: skip
            each = self.sampler.chunk_size * first.shape[1]
            if each % given.group_size:
                yield (
                    f"objective.group_size: {given.group_size} does not divide the {each} transitions of a chunk "
                    f"(sampler.chunk_size {self.sampler.chunk_size} times {first.shape[1]})"
                )

    def rollout_settings(self) -> RolloutSettings:
        objective = OBJECTIVES[self.objective.kind]
        return RolloutSettings(
            num_steps=self.sampler.steps,
            guidance=self.sampler.guidance,
            eta=self.sampler.eta,
            grid=self.sampler.grid,
            forward_looking=self.objective.forward_looking if objective.inner_rewards else "none",
            clean_prediction=self.objective.clean_prediction,
            from_step=self.objective.forward_looking_from,
            selection=self.sampler.transitions,
            fraction=self.sampler.transition_fraction,
            skip_last=self.objective.last_transition == "skip",
            image_only=not objective.inner_rewards,
            state_precision=self.sampler.state_precision,
        )


def _groups_fit(widths: Sequence[int]) -> bool:
    """Whether both flow networks can be built with these channels (learner/flow.py)."""
    if not widths or min(widths) < 8:
        return False
    groups = [min(32, low // 4, high // 4) for low, high in pairwise([widths[0], *widths])]
    sides = [low % g == high % g == 0 for g, (low, high) in zip(groups, pairwise([widths[0], *widths]), strict=True)]
    first = min(32, widths[0] // 4)
    return all(sides) and all(width % first == 0 and width % (widths[0] // 8) == 0 for width in widths)


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (default: the demo's preset) and apply `section.key=value` overrides.

    Raises:
        ConfigError: an unreadable file, any number of unknown keys and wrong values, or, where there are none, any
            number of contradictions.
    """
    config, faults = read_config(path, overrides)
    if faults:
        raise ConfigError("\n".join(faults))
    return config


def read_config(path: Path | None = None, overrides: Sequence[str] = ()) -> tuple[Config, list[str]]:
    """As load_config, but returns the faults, a line each, with the config that the sound settings make: so that
    whatever else is wrong can be said along with them.

    Raises:
        ConfigError: nothing can be made of the file.
    """
    path = path or DEFAULT_CONFIG
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"--config: {path} holds {type(tree).__name__}, expected sections of keys")
    return build_config(tree, overrides, str(path))


def build_config(tree: dict[str, Any], overrides: Sequence[str], source: str) -> tuple[Config, list[str]]:
    """The config that sections of keys and overrides make, with the faults; `tree`, read from `source`, is changed.

    Raises:
        ConfigError: it is of another version.
    """
    faults = [fault for override in overrides if (fault := _apply(tree, override))]
    if tree.get("config_version", CONFIG_VERSION) != CONFIG_VERSION:
        raise ConfigError(
            f"config_version: {source} is of version {tree['config_version']!r}, this Tributary reads "
            f"{CONFIG_VERSION}: use the version that wrote it, or start from a preset in configs/"
        )
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        faults += [_describe(item) for item in error.errors()]
        for item in error.errors():
            _leave_out(tree, item["loc"])
        return Config.model_validate(tree), faults
    return config, faults + list(config.contradictions())


def _leave_out(tree: dict[str, Any], location: Sequence[Any]) -> None:
    """Remove a faulty setting: `section.key`, or a section that is none."""
    section, *key = location
    if key and isinstance(tree.get(section), dict):
        tree[section].pop(key[0], None)
    else:
        tree.pop(section, None)


def resolve(path: str) -> Path:
    """A path of the config: as given if it exists, else relative to the project, so that presets hold from
    any working directory."""
    given = Path(path).expanduser()
    return given if given.exists() or given.is_absolute() else (ROOT / given if (ROOT / given).exists() else given)


def known_keys() -> dict[str, Any]:
    """Every `section.key` with its field."""
    return {
        f"{section}.{key}": field for section, outer in _sections().items() for key, field in outer.model_fields.items()
    }


def _sections() -> dict[str, type[Section]]:
    found = ((name, field.annotation) for name, field in Config.model_fields.items())
    return {name: kind for name, kind in found if isinstance(kind, type) and issubclass(kind, Section)}


def _apply(tree: dict[str, Any], override: str) -> str | None:
    key, equals, text = override.partition("=")
    if not equals:
        return f"{override}: expected key=value"
    *sections, leaf = key.strip().split(".")
    node: Any = tree
    for section in sections:
        node = node.setdefault(section, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return f"{key}: {'.'.join(sections)} holds a single value in the file, expected a section of keys"
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        node[leaf] = text
    return None


def _describe(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"][:2])
    if item["type"] == "extra_forbidden" and "." not in key:
        close = difflib.get_close_matches(key, _sections(), 1)
        return f"{key}: unknown section" + (
            f"; did you mean {close[0]}?" if close else f"; there are {', '.join(_sections())}"
        )
    if item["type"] == "extra_forbidden":
        return f"{key}: {_nearest(key)}"
    if item["type"] == "model_type":
        return f"{key}: expected a section of keys, got {item['input']!r}"
    return f"{key}: {item['msg']}, got {item['input']!r}"


def _nearest(key: str) -> str:
    keys = known_keys()
    by_leaf = [known for known in keys if known.split(".")[1] == key.split(".")[-1]]
    close = difflib.get_close_matches(key, keys, 1, 0.5) or by_leaf
    return "unknown key" + (f"; did you mean {close[0]}?" if close else f"; sections: {', '.join(_sections())}")
