"""The sections of a configuration: every key, its type, default and meaning. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from diffusion.settings import (
    CleanPrediction,
    ForwardLooking,
    Grid,
    Reduction,
    Selection,
    StatePrecision,
)
from learner.objectives.needs import NEEDS, Decay, Kind, Penalty, Weighting
from rewards.names import Backend, FeatureKind

Precision = Literal["float32", "bfloat16"]
LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"


def _selector(value: str) -> str:
    if not re.fullmatch(rf"!?({LABEL}|in\({LABEL}(, ?{LABEL})*\))", value):
        raise ValueError("expected a node label's value as VALUE, !VALUE, in(VALUE, ...) or !in(VALUE, ...)")
    return value.replace(" ", "")  # Ray takes a blank after the comma, and then finds no node with it


Labels = dict[str, Annotated[str, AfterValidator(_selector)]]


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
    autoscale: bool = Field(
        False, description="nodes that are not there yet will come: wait for them (ready_seconds) instead of refusing"
    )
    chunk_seconds: float = Field(600, gt=0, description="deadline for sampling or scoring one chunk")
    train_seconds: float = Field(1800, gt=0, description="deadline for the learner's part of an epoch")


class Model(Section):
    path: str = Field("models/shapes", description="diffusers pipeline folder, or hub id")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto (cuda if there), cpu or cuda")
    dtype: Precision = Field(
        "float32",
        description="of U-Net and VAE: float32 or bfloat16; LoRA, flow network, schedule, log-probabilities, reward "
        "models and reward gradients are float32 always",
    )
    channels_last: bool = Field(False, description="memory layout that convolutions in bfloat16 on a GPU prefer")
    compile: bool = Field(False, description="torch.compile the U-Net's transformer blocks; minutes at the start")
    tiny_decoder: str = Field(
        "madebyollin/taesd", description="AutoencoderTiny for objective.forward_looking_decoder=tiny: folder or hub id"
    )


class Prompts(Section):
    path: str | None = Field(
        "configs/prompts/shapes_placed.txt",
        description="prompts: a file, .txt (one a line), .json, .jsonl, .csv or .parquet; or, where no file has that "
        "name, a set: animals, imagenet_classes, and from the hub drawbench and hpdv2:STYLE (photo, paintings, anime, "
        "concept-art, also several as photo+paintings); null for models that take none",
    )
    column: str = Field("prompt", description="column or key that holds the prompt in .json, .jsonl, .csv and .parquet")
    per_prompt: int = Field(4, ge=1, description="trajectories drawn for each prompt of an epoch, side by side")


class SamplerConfig(Section):
    actors: int | None = Field(None, ge=1, description="sampler actors; default from the resources found")
    gpus: float | None = Field(None, ge=0, description="GPUs of a sampler actor; default: what the ranks leave, shared")
    labels: Labels = Field(
        default_factory=dict,
        description="labels of the nodes for sampler actors; values as Ray's: x, !x, in(x, y), !in(x)",
    )
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
    state_precision: StatePrecision = Field(
        "float32",
        description="of stored states and model outputs; float16 halves the object store: states are rounded inside "
        "the rollout, so log p_F stays exact",
    )


class RewardConfig(Section):
    actors: int | None = Field(None, ge=1, description="reward actors; default from the resources found")
    gpus: float | None = Field(None, ge=0, description="GPUs of a reward actor; default: what the ranks leave, shared")
    labels: Labels = Field(
        default_factory=dict,
        description="labels of the nodes for reward actors; values as Ray's: x, !x, in(x, y), !in(x)",
    )
    name: str = Field("shapes_alignment", description="reward by name, or your own as module:callable")
    weights: str | None = Field(None, description="weights of the reward model: path or hub id")
    backend: Backend = Field(
        "native",
        description="native: our own code, differentiable; package: imagereward's and hpsv2's packages in an "
        "environment of their own (python -m rewards.package build NAME), without gradients",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="keyword arguments of the reward; your own callable is then called with them first and returns it",
    )
    batch: int | None = Field(
        None,
        ge=1,
        description="images decoded and scored at once; default: what free GPU memory holds, chosen once a run (on a "
        "CPU 32, with gradients 16)",
    )

    on_bad_reward: Literal["stop", "quarantine"] = Field(
        "stop",
        description="what a NaN or infinite reward, one that raises, a black image or latents that are not numbers do: "
        "stop ends the run; quarantine sets the trajectory aside in quarantine/ and trains on another of its chunk",
    )
    quarantine_limit: int = Field(16, ge=0, description="trajectories that a run may set aside before it ends")
    black_images: Literal["bad", "allow"] = Field(
        "bad",
        description="an all-black image is the mark of NaN latents or of a safety checker; allow where black may be "
        "right (jpeg_compressibility)",
    )


class LoraConfig(Section):
    rank: int = Field(4, ge=1, description="LoRA rank")
    alpha: float | None = Field(None, gt=0, description="LoRA alpha; default: rank")


class FlowConfig(Section):
    widths: tuple[int, ...] = Field((64, 128, 256, 256), description="channels of the flow network's blocks")
    stem_stride: int = Field(
        1, ge=1, le=4, description="stride of its first convolution, not of nabla-DB's; 2 is four times cheaper"
    )
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
    attempts: int = Field(
        3,
        ge=1,
        description="times an epoch's training is tried when learner ranks die or hang; each but the first starts "
        "all ranks anew from the last checkpoint",
    )
    labels: Labels = Field(
        default_factory=dict,
        description="labels of the nodes for learner ranks; values as Ray's: x, !x, in(x, y), !in(x)",
    )
    learning_rate: float = Field(3e-4, gt=0, description="AdamW learning rate of the LoRA")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW weight decay of the LoRA")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm clip, for LoRA and flow network separately")
    micro_batch: int | None = Field(
        8,
        ge=1,
        description="transitions a forward and backward pass; null: what free GPU memory holds, chosen once a run (on "
        "a CPU 8)",
    )
    gradient_checkpointing: bool = Field(
        False, description="compute the U-Net's activations again in the backward pass: less memory, a third more work"
    )


class Objective(Section):
    """What is minimised. `setting` changes the defaults of other keys, objective by objective (learner/objectives/)."""

    kind: Kind = Field("dag_db", description=", ".join(NEEDS))
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
    forward_looking_decoder: Literal["full", "tiny"] = Field(
        "full",
        description="decoder of psi's clean predictions: full (the VAE), or tiny (model.tiny_decoder); the image "
        "itself is always decoded by the VAE",
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
    regulariser: float = Field(
        1.0, ge=0, description="weight of the squared change of the model output since before the epoch's updates"
    )
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
        kind, setting = given.get("kind", "dag_db"), given.get("setting", "corrected")
        if not isinstance(kind, str) or not isinstance(setting, str) or kind not in NEEDS:
            return given  # pydantic says what is wrong
        return {**NEEDS[kind].defaults.get(setting, {}), **given}


class Train(Section):
    epochs: int = Field(100, ge=1, description="epochs")
    trajectories: int = Field(512, ge=1, description="trajectories an epoch")
    updates_per_epoch: int = Field(2, ge=1, description="policy optimizer steps an epoch on its own trajectories")
    replay_updates: int = Field(
        0, ge=0, description="more policy steps an epoch, each on an update's trajectories of an earlier epoch"
    )
    replay_epochs: int = Field(4, ge=1, description="earlier epochs that replay_updates draw from")
    max_staleness: int = Field(
        0,
        ge=0,
        description="published versions that trajectories may lag behind the learner's; 0: synchronous, as the papers",
    )
    stop_on_collapse: bool = Field(
        False, description="end the run, in good order, where an evaluation shows collapse (evaluation/collapse.py)"
    )
    shuffle_rewards: bool = Field(
        False, description="control experiment: permute each trajectory's rewards among the trajectories of a chunk"
    )


class Evaluation(Section):
    prompts: str | None = Field(None, description="file or set of fixed evaluation prompts; default: prompts.path")
    images: int = Field(128, ge=0, description="images of the fixed evaluation set")
    every: int = Field(10, ge=1, description="epochs between evaluations (before the first and after the last always)")
    seed: int = Field(0, ge=0, description="seed of the evaluation noise, the same for every run.seed")
    held_out: tuple[str | dict[str, Any], ...] = Field(
        (),
        description="rewards that judge evaluation images and are never trained on: names, or {name, weights, options}",
    )
    features: FeatureKind = Field(
        "pixels",
        description="what diversity and drift are measured by: pixels (mean colours of an 8 x 8 grid, for plain "
        "pictures), clip (evaluation.clip), or dreamsim (the package of that name)",
    )
    clip: str | None = Field(
        None, description="CLIP for evaluation.features=clip: folder or hub id; default: openai/clip-vit-large-patch14"
    )


class Mlflow(Section):
    enabled: bool = Field(True, description="show the run in MLflow; the run directory is complete without it")
    uri: str | None = Field(
        None,
        description="tracking server; default MLFLOW_TRACKING_URI, else sqlite in mlflow.db beside the run directory",
    )
    experiment: str = Field("tributary", description="MLflow experiment")
    group: str | None = Field(
        None,
        pattern=r"^[\w .:/=+-]{1,200}$",
        description="name of a group of runs that belong together: MLflow nests them under a parent run of that name",
    )
    registered_model: str | None = Field(
        None,
        pattern=r"^[\w .=+-]{0,199}[\w=+-]$",
        description="name in MLflow's model registry for the finished run's LoRA; default: not registered",
    )
    finish_seconds: float = Field(
        30, ge=0, description="longest wait for a last upload; `python -m learner.upload RUN` does the rest"
    )
