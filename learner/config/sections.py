"""The sections of a configuration: every key, its type, default and meaning. Imports no torch."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from diffusion.settings import CleanPrediction, ForwardLooking, Grid, Reduction, Selection, StatePrecision, StepKernel
from learner.objectives.needs import NEEDS, Decay, Kind, Penalty, Weighting
from rewards.names import FeatureKind

Precision = Literal["float32", "bfloat16"]
LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"


def _selector(value: str) -> str:
    if not re.fullmatch(rf"!?({LABEL}|in\({LABEL}(, ?{LABEL})*\))", value):
        raise ValueError("expected a node label's value as VALUE, !VALUE, in(VALUE, ...) or !in(VALUE, ...)")
    return value.replace(" ", "")  # Ray takes a blank after the comma, and then finds no node with it


Labels = dict[str, Annotated[str, AfterValidator(_selector)]]


def key(default: Any, description: str, **limits: Any) -> Any:
    """A key of a section; `limits` as pydantic's Field has them (ge, gt, le, pattern)."""
    return Field(default, description=description, **limits)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Run(Section):
    dir: str | None = key(None, "run directory or fsspec URL; default runs/NAME-DATE-TIME, NAME from the config file")
    root: str | None = key(None, "where a relative run.dir is; default: here, or ~/tributary in a submitted Ray job")
    resume: Literal["auto", "never"] = key(
        "auto",
        "auto: go on with the run in run.dir, or without run.dir with the newest unfinished run of the same settings; "
        "never: start afresh",
    )
    keep_checkpoints: int = key(3, "newest checkpoints kept, beside those of evaluated epochs; 0: all", ge=0)
    thumbnail_pixels: int = key(64, "side of the pictures in trajectories/*.parquet; 0: none", ge=0)
    chunk_attempts: int = key(3, "times a chunk is tried on another actor when its actor dies or hangs", ge=1)
    seed: int = key(0, "seed of all randomness in the run", ge=0, lt=2**62)
    runner: Literal["ray", "inprocess"] = key("ray", "ray: actors; inprocess: the same parts in one process")
    cpu_threads: int = key(1, "torch threads of each process (results depend on it)", ge=1)
    ready_seconds: float = key(300, "deadline for all actors to be up", gt=0)
    autoscale: bool = key(False, "nodes that are not there yet will come: wait for them (ready_seconds)")
    chunk_seconds: float = key(600, "deadline for sampling or scoring one chunk", gt=0)
    train_seconds: float = key(1800, "deadline for the learner's part of an epoch", gt=0)


class Model(Section):
    path: str = key("models/shapes", "diffusers pipeline folder, or hub id")
    device: Literal["auto", "cpu", "cuda"] = key("auto", "auto (cuda if there), cpu or cuda")
    pixels: int | None = key(None, "side of the pictures; default: what the base model was made for", ge=8)
    text_tokens: int | None = key(
        None,
        "of a prompt that a T5 reads (Stable Diffusion 3, FLUX); default: 256 or 512, as their pipelines",
        ge=1,
        le=512,
    )
    dtype: Precision = key("float32", "of U-Net and VAE, float32 or bfloat16; everything else is float32 always")
    channels_last: bool = key(False, "memory layout that convolutions in bfloat16 on a GPU prefer")
    compile: bool = key(False, "torch.compile the U-Net's transformer blocks; minutes at the start")
    tiny_decoder: str = key("madebyollin/taesd", "folder or hub id, for objective.forward_looking_decoder=tiny")


class Prompts(Section):
    path: str | tuple[str, ...] | None = key(
        "configs/prompts/shapes_placed.txt",
        "a file, .txt (a prompt a line), .json, .jsonl, .csv or .parquet; or, where no file has that name, a set: "
        "animals, imagenet_classes, and from the hub drawbench and hpdv2:STYLE (photo, paintings, anime, concept-art, "
        "also several as photo+paintings); or a list of prompts; null for models that take none",
    )
    column: str = key("prompt", "column or key that holds the prompt in .json, .jsonl, .csv and .parquet")
    per_prompt: int = key(4, "trajectories drawn for each prompt of an epoch, side by side", ge=1)


class SamplerConfig(Section):
    actors: int | None = key(None, "sampler actors; default from the resources found", ge=1)
    gpus: float | None = key(None, "GPUs of a sampler actor; default: what the ranks leave, shared", ge=0)
    labels: Labels = key({}, "labels of the nodes for sampler actors; values as Ray's: x, !x, in(x, y), !in(x)")
    chunk_size: int = key(16, "trajectories rolled out together", ge=1)
    steps: int = key(50, "DDIM steps N", ge=2, le=1000)
    guidance: float = key(5.0, "classifier-free guidance scale w, in rollout and training; 1: off", ge=1)
    noise: Literal["all", "window"] = key(
        "all",
        "where noise is added: in all transitions, or up to the end of objective.window and by deterministic DDIM "
        "after it, in rollouts and in evaluations",
    )
    adapter: Literal["all", "window"] = key(
        "all",
        "where the LoRA is used: in all transitions, or in those of objective.window alone and the base model in the "
        "others, in rollouts and in evaluations",
    )
    eta: float = key(1.0, "noise scale of DDIM; 1 is the papers', and the only one of objectives with p_B", gt=0, le=1)
    kernel: StepKernel = key(
        "ddim",
        "of a step: ddim; of flow models also calibrated, whose steps have more variance where few would draw too "
        "little, or flow_grpo, that method's step (eta is its a, by default 0.7), for objectives without p_B",
    )
    spread: tuple[Annotated[float, Field(ge=0, le=1e6)], ...] | None = key(
        None,
        "of kernel=calibrated: at each step the mean square of a number of image minus clean prediction; default: "
        "measured on the base model before training",
    )
    grid: Grid = key(
        "ddim",
        "timesteps: ddim (the scheduler's own spacing), or dpm_solver: of first-order SDE-DPM-Solver++ with "
        "final_sigmas_type=sigma_min, which with eta 1 is that sampler",
    )
    transitions: Selection = key("all", "which transitions to train on: all, random or low_variance")
    transition_fraction: float = key(1.0, "share of transitions for random and low_variance", gt=0, le=1)
    state_precision: StatePrecision = key(
        "float32", "of stored states and model outputs; float16 halves the object store, log p_F stays exact"
    )

    @model_validator(mode="before")
    @classmethod
    def _noise_of_flow_grpo(cls, given: Any) -> Any:
        published = isinstance(given, dict) and given.get("kernel") == "flow_grpo"
        return {"eta": 0.7, **given} if published else given


class RewardConfig(Section):
    actors: int | None = key(None, "reward actors; default from the resources found", ge=1)
    gpus: float | None = key(None, "GPUs of a reward actor; default: what the ranks leave, shared", ge=0)
    labels: Labels = key({}, "labels of the nodes for reward actors; values as Ray's: x, !x, in(x, y), !in(x)")
    name: str = key("shapes_alignment", "reward by name, or your own as module:callable")
    weights: str | None = key(None, "weights of the reward model: path or hub id")
    options: dict[str, Any] = key({}, "the reward's keyword arguments; a callable of yours is called with them first")
    try_first: bool = key(
        True,
        "call the rewards once on two made-up pictures before anything is loaded (models with weights only at "
        "--try-reward); false: for rewards that only the machines of the actors can load",
    )
    batch: int | None = key(
        None,
        "images scored at once; default: what free GPU memory holds; without a GPU 32 or 2^20 pixels together, "
        "with gradients 16 or 2^18",
        ge=1,
    )
    on_bad_reward: Literal["stop", "quarantine"] = key(
        "stop",
        "what a NaN or infinite reward, one that raises, a black image or latents that are not numbers do: stop "
        "ends the run; quarantine sets the trajectory aside in quarantine/ and trains on another of its chunk",
    )
    quarantine_limit: int = key(16, "trajectories that a run may set aside before it ends", ge=0)
    black_images: Literal["bad", "allow"] = key(
        "bad", "an all-black image is the mark of NaN latents or a safety checker; allow where it may be right"
    )

    @property
    def normalise(self) -> Any:
        """Of a weighted_sum, reward.options.normalise as given (rewards/names.py); else none."""
        return self.options.get("normalise", "none") if self.name == "weighted_sum" else "none"


class LoraConfig(Section):
    rank: int = key(4, "LoRA rank", ge=1)
    alpha: float | None = key(None, "LoRA alpha; default: rank", gt=0)
    targets: Literal["attention", "all"] = key(
        "attention", "layers it adapts: attention projections, or also feed-forward, convolutions and time projections"
    )


class FlowConfig(Section):
    widths: tuple[int, ...] = key((64, 128, 256, 256), "channels of the flow network's blocks")
    stem_stride: int = key(1, "stride of its first convolution, not of nabla-DB's; 2 is four times cheaper", ge=1, le=4)
    learning_rate: float = key(3e-4, "AdamW learning rate of the flow network", gt=0)
    weight_decay: float | None = key(None, "AdamW weight decay; default: learner.weight_decay", ge=0)
    fit_steps: int = key(0, "flow-only steps before each policy step, the flow then fixed; 0: one joint loss", ge=0)
    warmup_steps: int = key(0, "flow-only steps before the first policy step: an unfitted flow is noise to it", ge=0)
    batch: int = key(128, "transitions a flow-only step and rank", ge=4)
    replay_epochs: int = key(1, "epochs of rollouts the flow-only steps draw from", ge=1)


class LearnerConfig(Section):
    ranks: int | None = key(None, "data-parallel learner processes; default from the resources found", ge=1)
    gpus: float | None = key(None, "GPUs of a learner rank; default: a whole one, if there are enough", ge=0)
    attempts: int = key(
        3, "times an epoch's training is tried: when ranks die or hang, all start anew from the last checkpoint", ge=1
    )
    labels: Labels = key({}, "labels of the nodes for learner ranks; values as Ray's: x, !x, in(x, y), !in(x)")
    optimizer: Literal["adamw", "natural"] = key(
        "adamw",
        "of the LoRA: adamw, or natural: least squares in the objective's residuals, without a learning rate, for "
        "objectives that are sums of squares; trains the LoRA's B matrices",
    )
    natural_epochs: int = key(1, "natural: a step solves over the trajectories of so many epochs", ge=1)
    natural_floor: float = key(0.1, "natural: least Fisher information that is scaled for, in medians", gt=0)
    learning_rate: float = key(3e-4, "AdamW learning rate of the LoRA", gt=0)
    schedule: Literal["constant", "linear"] = key(
        "constant",
        "of the LoRA's learning rate: constant, or linear: up over the first 5 % of the updates, to 0 at the end",
    )
    adam_beta2: float = key(
        0.999,
        "AdamW's decay of squared gradients of the LoRA; lower forgets the first, large ones within a short run",
        ge=0,
        lt=1,
    )
    weight_decay: float = key(1e-4, "AdamW weight decay of the LoRA", ge=0)
    max_grad_norm: float = key(1.0, "gradient norm clip, for LoRA and flow network separately", gt=0)
    micro_batch: int | None = key(
        8, "transitions a forward and backward pass; null: what free GPU memory holds, once a run (CPU: 8)", ge=1
    )
    gradient_checkpointing: bool = key(False, "compute activations twice: less memory, a third more work")


class Objective(Section):
    """What is minimised. `setting` changes the defaults of other keys, objective by objective (learner/objectives/)."""

    kind: Kind = key("dag_db", ", ".join(NEEDS))
    setting: Literal["corrected", "faithful"] = key(
        "corrected", "defaults of the keys below: faithful is the published code, with its defects (docs/algorithms.md)"
    )
    beta: float = key(100.0, "reward exponent (per dimension when log_prob_reduction is mean)", ge=0)
    anneal_fraction: float = key(0.5, "beta rises linearly over this share of the epochs", ge=0, le=1)
    log_prob_reduction: Reduction = key("mean", "of all but nabla-DB: over dimensions, mean or sum")
    forward_looking: ForwardLooking = key("base", "weights of psi's clean predictions: base, snapshot, none")
    forward_looking_decay: Decay = key("none", "weight of psi by timestep: none (the paper), sqrt_abar or abar")
    reward_offset: float | None = key(
        None,
        "of objectives with a flow network f: subtracted from rewards: shifts log Z alone; near their mean f has less "
        "to do; default: the mean of the evaluation before training (0 where there is none, and in the faithful "
        "setting)",
    )
    forward_looking_from: int = key(0, "psi is 0 before this step, and nothing is decoded there", ge=0)
    forward_looking_decoder: Literal["full", "tiny"] = key(
        "full", "of psi's clean predictions: full (the VAE, images' always), or tiny (model.tiny_decoder)"
    )
    clean_prediction: CleanPrediction = key(
        "conditional", "model output behind psi: conditional (DAG's code), or guided (nabla's; foretells better)"
    )
    detach_next_flow: bool = key(True, "no gradient into f(x_t'), h(x_t'); false is the published code")
    trajectory_weight: Literal["uniform", "target"] = key(
        "uniform",
        "of fitted nabla-DB: uniform, or target: the target's density over the policy's, so that where steps of fixed "
        "variance cannot follow the target their means still do",
    )
    penalty: Penalty = key("squared", "of residuals, squared or huber")
    huber_width: float = key(1.0, "residual in nats where huber turns linear", gt=0)
    transition_weight: Weighting = key("uniform", "uniform, or variance: weight sigma_t^2 over its mean")
    last_transition: Literal["train", "skip"] = key(
        "train", "skip: not trained on, the state before it counts as terminal (its 1/sigma^2 drowns the rest)"
    )
    window: Literal["all", "auto"] | tuple[int, int] = key(
        "all",
        "which transitions are trained, from 0: all; [first, last]; or auto: those that settle window_share of the "
        "reward's variance, measured before training. At its end the image's reward counts, nabla-DB: the clean "
        "prediction's",
    )
    window_share: float = key(0.95, "of the reward's variance, for window=auto", gt=0, lt=1)
    regulariser: float = key(1.0, "weight of the squared change of the model output within an epoch's updates", ge=0)
    clip_range: float = key(
        1e-4,
        "dag_kl, ddpo, grpo: how far the ratio to the rollout policy may leave 1; under mean log-probabilities 1e-4 is "
        "D x 1e-4 nats (1.64 at D = 16384), under sum 1e-4 nats",
        gt=0,
    )
    old_log_prob: Literal["sampler", "learner"] = key(
        "sampler", "dag_kl, ddpo, grpo: whose log p_F of the rollout policy; the learner's is of its own precision"
    )
    group_size: int = key(8, "dag_kl: transitions that are compared with each other, of one chunk", ge=2)
    kl_weight: float | None = key(None, "dag_kl: weight of the policy loss; default: the final beta (the paper)", ge=0)
    advantage: Literal["epoch", "prompt"] = key(
        "epoch", "ddpo: rewards are compared with the epoch's, or the prompt's last 16 once it has 16"
    )
    log_z: Literal["group", "learned"] = key(
        "group", "rtb, tb: log Z of a prompt, from its other trajectories of the epoch, or a learned number"
    )
    log_z_rate: float = key(0.1, "rtb, tb: share of the way that a learned log Z moves in an epoch", gt=0, le=1)
    segments: Literal["end", "all"] = key("end", "rsub, sub_tb: those that end with the image, or all")
    segment_decay: float = key(0.9, "rsub, sub_tb with segments=all: lambda, weight by a segment's length", gt=0, le=1)
    reference_kl: float = key(0.0, "grpo: weight of a transition's exact KL to the frozen model, in nats", ge=0)
    later_kl: float = key(
        0.0,
        "weight of the same KL at the transitions behind the window, where they have noise; 0: nothing holds them",
        ge=0,
    )
    pretrained_strength: float = key(1.0, "residual nabla-DB: exponent eta_p of the base model's density", ge=0)
    flow_start: Literal["zero", "reference"] = key(
        "zero", "nabla_db: what h_phi is added to, nothing (the paper) or the frozen model's own score"
    )
    reverse_weight: float = key(1.0, "nabla-DB: weight of the reverse loss", ge=0)
    reverse_transitions: Literal["all", "inner"] = key(
        "all", "nabla-DB: reverse loss on every transition, or (published) on all but the last"
    )
    decay_terminal: bool = key(False, "nabla-DB: the image's reward gradient fades by abar_0 too (published), not by 1")

    def span(self, steps: int) -> tuple[int, int]:
        """First and last state of the trained transitions, of `steps` in all. Where it is not measured yet: all."""
        if isinstance(self.window, tuple):
            return self.window[0], self.window[1] + 1
        return 0, steps - (self.last_transition == "skip")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_setting(cls, given: Any) -> Any:
        """What the objective's kind and setting say, where a key is not given."""
        if not isinstance(given, dict):
            return given
        kind, setting = str(given.get("kind", "dag_db")), str(given.get("setting", "corrected"))
        return {**(NEEDS[kind].defaults.get(setting, {}) if kind in NEEDS else {}), **given}  # pydantic names a bad one


class Train(Section):
    epochs: int = key(100, "epochs", ge=1, le=1_000_000)
    trajectories: int = key(512, "trajectories an epoch", ge=1)
    updates_per_epoch: int = key(2, "policy optimizer steps an epoch on its own trajectories", ge=1)
    replay_updates: int = key(
        0,
        "more policy steps an epoch, each on an update's trajectories of an earlier one (fitted nabla-DB: of this one)",
        ge=0,
    )
    replay_epochs: int = key(
        4,
        "earlier epochs that replay_updates draw from, and a fitted log-flow learns from beside the present one",
        ge=1,
    )
    max_staleness: int = key(0, "policy versions that trajectories may lag behind; 0: synchronous, as the papers", ge=0)
    stop_on_collapse: bool = key(False, "end the run where an evaluation shows collapse (evaluation/collapse.py)")
    shuffle_rewards: bool = key(False, "control experiment: permute rewards among the trajectories of a chunk")


class Evaluation(Section):
    prompts: str | None = key(None, "file or set of fixed evaluation prompts; default: prompts.path")
    images: int = key(128, "images of the fixed evaluation set", ge=0)
    every: int = key(10, "epochs between evaluations (before the first and after the last always)", ge=1)
    seed: int = key(0, "seed of the evaluation noise, the same for every run.seed", ge=0, lt=2**62)
    held_out: tuple[str | dict[str, Any], ...] = key(
        (), "rewards that judge evaluation images and are never trained on: names, or {name, weights, options}"
    )
    features: FeatureKind = key(
        "pixels",
        "measure of diversity and drift: pixels (mean colours of an 8 x 8 grid) or clip",
    )
    clip: str | None = key(None, "for features=clip: folder or hub id; default: openai/clip-vit-large-patch14")


class Mlflow(Section):
    enabled: bool = key(True, "show the run in MLflow; the run directory is complete without it")
    uri: str | None = key(None, "server; default MLFLOW_TRACKING_URI, else mlflow.db beside the run directory")
    experiment: str = key("tributary", "MLflow experiment")
    group: str | None = key(
        None, "name of a group of runs: MLflow nests them under the oldest of them", pattern=r"^[\w .:/=+-]{1,200}$"
    )
    registered_model: str | None = key(
        None,
        "name in MLflow's model registry for the finished run's LoRA; default: not registered",
        pattern=r"^[\w .=+-]{0,199}[\w=+-]$",
    )
    finish_seconds: float = key(30, "longest wait for a last upload; `python -m learner.upload` does the rest", ge=0)
