"""The configuration: every key, its type, default and meaning; how YAML and `key=value` become one.

Errors are collected and reported together, each naming its key and, for a misspelt one, the nearest known key.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffusion.kernels import Grid, Reduction
from diffusion.rollout import CleanPrediction, ForwardLooking, RolloutSettings
from diffusion.transitions import Selection, select
from learner.objectives import OBJECTIVES, Kind
from learner.objectives.base import Decay, Weighting
from learner.objectives.db import Penalty

CONFIG_VERSION = 1  # of the keys and their meaning
ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = ROOT / "configs" / "shapes_alignment.yaml"


class ConfigError(ValueError):
    """Everything wrong with a configuration, one line a fault."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Run(Section):
    dir: str | None = Field(
        None, description="run directory or fsspec URL; default runs/NAME-DATE-TIME, NAME from the config file"
    )
    root: str | None = Field(
        None, description="what a relative run.dir is relative to; default: here, or ~/tributary in a submitted Ray job"
    )
    resume: str = Field(
        "auto",
        description="auto: go on with the run in run.dir, or without run.dir with the newest unfinished run of "
        "the same settings; never: start afresh; or the path of a run or checkpoint to go on from",
    )
    keep_checkpoints: int = Field(
        3, ge=0, description="newest checkpoints kept, beside those of evaluated epochs; 0: all"
    )
    thumbnail_pixels: int = Field(64, ge=0, description="side of the pictures in trajectories/*.parquet; 0: none")
    chunk_attempts: int = Field(
        3, ge=1, description="times a chunk is tried on another actor when its actor dies or hangs"
    )
    seed: int = Field(0, ge=0, description="seed of all randomness in the run")
    runner: Literal["ray", "inprocess"] = Field(
        "ray", description="ray: actors; inprocess: the same parts in one process"
    )
    cpu_threads: int = Field(1, ge=1, description="torch threads of each process (results depend on it)")
    ready_seconds: float = Field(300, gt=0, description="deadline for all actors to be up")
    chunk_seconds: float = Field(600, gt=0, description="deadline for sampling or scoring one chunk")
    train_seconds: float = Field(1800, gt=0, description="deadline for the learner's part of an epoch")


class Model(Section):
    path: str = Field("models/shapes", description="diffusers pipeline folder, or hub id")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto (cuda if there), cpu or cuda")


class Prompts(Section):
    path: str | None = Field(
        "configs/prompts/shapes_placed.txt",
        description="prompts: .txt (one a line), .jsonl, .csv or .parquet; null for models that take none",
    )
    column: str = Field("prompt", description="column or key that holds the prompt in .jsonl, .csv and .parquet")
    per_prompt: int = Field(4, ge=1, description="trajectories drawn for each prompt of an epoch, side by side")


class SamplerConfig(Section):
    actors: int | None = Field(None, ge=1, description="sampler actors; default from the resources found")
    gpus: float | None = Field(None, ge=0, description="GPUs of a sampler actor; default: what the ranks leave, shared")
    chunk_size: int = Field(16, ge=1, description="trajectories rolled out together")
    steps: int = Field(50, ge=2, le=1000, description="DDIM steps N")
    guidance: float = Field(5.0, ge=1, description="classifier-free guidance scale w, in rollout and training; 1: off")
    eta: float = Field(1.0, gt=0, description="noise scale of DDIM; 1 is the papers'")
    grid: Grid = Field(
        "ddim",
        description="timesteps: ddim (the scheduler's own spacing), or dpm_solver: those of first-order "
        "SDE-DPM-Solver++ with final_sigmas_type=sigma_min, which with eta 1 is that sampler",
    )
    transitions: Selection = Field("all", description="which transitions to train on: all, random or low_variance")
    transition_fraction: float = Field(1.0, gt=0, le=1, description="share of transitions for random and low_variance")


class RewardConfig(Section):
    actors: int | None = Field(None, ge=1, description="reward actors; default from the resources found")
    gpus: float | None = Field(None, ge=0, description="GPUs of a reward actor; default: what the ranks leave, shared")
    name: str = Field("shapes_alignment", description="reward by name, or your own as module:callable")
    weights: str | None = Field(None, description="weights of the reward model: path or hub id")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="keyword arguments of the reward; your own callable is then called with them first and returns it",
    )


class LoraConfig(Section):
    rank: int = Field(4, ge=1, description="LoRA rank")
    alpha: float | None = Field(None, gt=0, description="LoRA alpha; default: rank")


class FlowConfig(Section):
    widths: tuple[int, ...] = Field((64, 128, 256, 256), description="channels of the flow network's blocks")
    stem_stride: int = Field(1, ge=1, le=4, description="stride of its first convolution; 2 is four times cheaper")
    learning_rate: float = Field(3e-4, gt=0, description="AdamW learning rate of the flow network")
    weight_decay: float | None = Field(None, ge=0, description="AdamW weight decay; default: learner.weight_decay")
    fit_steps: int = Field(
        0,
        ge=0,
        description="flow-only steps before each policy step, which then holds the flow fixed; 0: one joint loss",
    )
    warmup_steps: int = Field(
        0, ge=0, description="flow-only steps before the very first policy step: an unfitted flow is all noise to it"
    )
    batch: int = Field(128, ge=4, description="transitions a flow-only step and rank")
    replay_epochs: int = Field(1, ge=1, description="epochs of rollouts the flow-only steps draw from")


class LearnerConfig(Section):
    ranks: int | None = Field(
        None, ge=1, description="data-parallel learner processes; default from the resources found"
    )
    gpus: float | None = Field(
        None, ge=0, description="GPUs of a learner rank; default: a whole one, if there are enough"
    )
    learning_rate: float = Field(3e-4, gt=0, description="AdamW learning rate of the LoRA")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay of the LoRA")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm clip, for LoRA and flow network separately")
    micro_batch: int = Field(8, ge=1, description="transitions a forward and backward pass")


class Objective(Section):
    """What is minimised. `setting` changes the defaults of other keys, objective by objective (learner/objectives/)."""

    kind: Kind = Field("dag_db", description=", ".join(OBJECTIVES))
    setting: Literal["corrected", "faithful"] = Field(
        "corrected",
        description="defaults of the keys below: faithful is the published code, with its defects (docs/algorithms.md)",
    )
    beta: float = Field(100.0, ge=0, description="reward exponent (per dimension when log_prob_reduction is mean)")
    anneal_fraction: float = Field(0.5, ge=0, le=1, description="beta rises linearly over this share of the epochs")
    log_prob_reduction: Reduction = Field(
        "mean", description="dag_db, dag_kl, ddpo: log-probabilities summed or averaged over dimensions"
    )
    forward_looking: ForwardLooking = Field(
        "base", description="weights of psi's clean predictions: base, snapshot, none"
    )
    forward_looking_decay: Decay = Field(
        "none", description="weight of psi by timestep: none (the paper), sqrt_abar or abar (1 at the image)"
    )
    reward_offset: float = Field(
        0.0,
        description="subtracted from every reward: shifts log Z alone; near the mean reward it spares the flow work",
    )
    forward_looking_from: int = Field(
        0, ge=0, description="psi is 0 before this step (nothing is decoded there); at 0 it is used everywhere"
    )
    clean_prediction: CleanPrediction = Field(
        "conditional",
        description="model output behind psi: conditional (DAG's code), or guided (nabla's; foretells better)",
    )
    detach_next_flow: bool = Field(True, description="no gradient into f(x_t'), h(x_t'); false is the published code")
    penalty: Penalty = Field("squared", description="dag_db, dag_kl: of the residual, squared or huber")
    huber_width: float = Field(1.0, gt=0, description="residual in nats where huber turns linear")
    transition_weight: Weighting = Field("uniform", description="uniform, or variance: weight sigma_t^2 over its mean")
    last_transition: Literal["train", "skip"] = Field(
        "train",
        description="skip: not trained on, the state before it counts as terminal (its 1/sigma^2 drowns the rest)",
    )
    regulariser: float = Field(1.0, ge=0, description="weight of the squared change of the model output since rollout")
    clip_range: float = Field(
        1e-4,
        gt=0,
        description="dag_kl, ddpo: how far the ratio to the rollout policy may leave 1; under mean log-probabilities "
        "1e-4 is D x 1e-4 nats (1.64 at D = 16384), under sum 1e-4 nats",
    )
    old_log_prob: Literal["sampler", "learner"] = Field(
        "sampler",
        description="dag_kl, ddpo: whose log p_F of the rollout policy; learner computes it anew, in its own precision "
        "and batches",
    )
    group_size: int = Field(8, ge=2, description="dag_kl: transitions that are compared with each other, of one chunk")
    kl_weight: float | None = Field(
        None, ge=0, description="dag_kl: weight of the policy loss; default: the final beta, as in the paper"
    )
    advantage: Literal["epoch", "prompt"] = Field(
        "epoch",
        description="ddpo: rewards are compared with the epoch's, or the prompt's last 16 once it has 16",
    )
    pretrained_strength: float = Field(
        1.0, ge=0, description="residual nabla-DB: exponent eta_p of the base model's density in the target"
    )
    flow_start: Literal["zero", "reference"] = Field(
        "zero", description="nabla_db: what h_phi is added to, nothing (the paper) or the frozen model's own score"
    )
    reverse_weight: float = Field(1.0, ge=0, description="nabla-DB: weight of the reverse loss")
    reverse_transitions: Literal["all", "inner"] = Field(
        "all", description="nabla-DB: reverse loss on every transition, or (published) on all but the last"
    )
    decay_terminal: bool = Field(
        False, description="nabla-DB: the reward's gradient at the image fades by abar_0 too (published), not by 1"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_setting(cls, given: Any) -> Any:
        """What the objective's kind and setting say, where a key is not given."""
        if not isinstance(given, dict):
            return given
        objective = OBJECTIVES.get(given.get("kind", "dag_db"))
        defaults = objective.settings.get(given.get("setting", "corrected"), {}) if objective else {}
        return {**defaults, **given}


class Train(Section):
    epochs: int = Field(100, ge=1, description="epochs")
    trajectories: int = Field(512, ge=1, description="trajectories an epoch")
    updates_per_epoch: int = Field(2, ge=1, description="policy optimizer steps an epoch on its own trajectories")
    replay_updates: int = Field(
        0, ge=0, description="more policy steps an epoch, each on an update's trajectories of an earlier epoch"
    )
    replay_epochs: int = Field(4, ge=1, description="earlier epochs that replay_updates draw from")
    shuffle_rewards: bool = Field(
        False, description="control experiment: permute each trajectory's rewards among the trajectories of a chunk"
    )


class Evaluation(Section):
    prompts: str | None = Field(None, description="file of fixed evaluation prompts; default: prompts.path")
    images: int = Field(128, ge=0, description="images of the fixed evaluation set")
    every: int = Field(10, ge=1, description="epochs between evaluations (before the first and after the last always)")
    seed: int = Field(0, ge=0, description="seed of the evaluation noise, the same for every run.seed")


class Mlflow(Section):
    enabled: bool = Field(True, description="show the run in MLflow; the run directory is complete without it")
    uri: str | None = Field(
        None,
        description="tracking server; default MLFLOW_TRACKING_URI, else sqlite in mlflow.db beside the run directory",
    )
    experiment: str = Field("tributary", description="MLflow experiment")
    finish_seconds: float = Field(
        30, ge=0, description="longest wait for a last upload; `python -m learner.upload RUN` does the rest"
    )


# What a resumed run may set anew: on CPU none of it changes a bit of the result, but train.epochs, which prolongs it.
FREE = (
    "run.dir", "run.root", "run.resume", "run.keep_checkpoints", "run.thumbnail_pixels", "run.chunk_attempts",
    "run.ready_seconds", "run.chunk_seconds", "run.train_seconds", "sampler.actors", "sampler.gpus", "reward.actors",
    "reward.gpus", "learner.gpus", "train.epochs", "mlflow.enabled", "mlflow.uri", "mlflow.experiment",
    "mlflow.finish_seconds",
)  # fmt: skip


class Config(Section):
    config_version: int = Field(CONFIG_VERSION, description="version of these keys; set only by the program")
    run: Run = Run()
    model: Model = Model()
    prompts: Prompts = Prompts()
    sampler: SamplerConfig = SamplerConfig()
    reward: RewardConfig = RewardConfig()
    lora: LoraConfig = LoraConfig()
    flow: FlowConfig = FlowConfig()
    learner: LearnerConfig = LearnerConfig()
    objective: Objective = Objective()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    mlflow: Mlflow = Mlflow()

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
        if self.train.replay_updates and not objective.off_policy:
            allowed = ", ".join(kind for kind, other in OBJECTIVES.items() if other.off_policy)
            yield (
                f"train.replay_updates: {given.kind} learns from the ratio of the current policy to the one that "
                f"sampled, which gives no gradient outside 1 +- objective.clip_range {given.clip_range:g} and does not "
                f"weigh the states that were met: trajectories of earlier epochs' policies are out of its reach; use "
                f"train.replay_updates=0, or one of {allowed}"
            )
        if (self.flow.fit_steps or self.flow.warmup_steps) and not objective.fits_flow:
            allowed = ", ".join(kind for kind, other in OBJECTIVES.items() if other.fits_flow)
            yield (
                f"flow.fit_steps, flow.warmup_steps: {given.kind} has no flow network that could be fitted alone; "
                f"set both to 0, or use one of {allowed}"
            )
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
        )


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
    faults = [fault for override in overrides if (fault := _apply(tree, override))]
    if tree.get("config_version", CONFIG_VERSION) != CONFIG_VERSION:
        raise ConfigError(
            f"config_version: {path} is of version {tree['config_version']!r}, this Tributary reads {CONFIG_VERSION}: "
            "use the version that wrote it, or start from a preset in configs/"
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
