"""`--plan`: what a run would do and cost, without running it: actors, work, FLOPs, bytes.

FLOPs are counted by torch on networks without weights (a multiplication and an addition are two).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster import placement as places
from cluster.placement import Placement
from commands import fits, hours, memory
from commands.counts import Costs, Work
from commands.networks import networks, passes_of
from diffusion import lora, noise
from diffusion.calibration import STEPS
from diffusion.locate import PUBLISHED, ROOT
from diffusion.rollout import states_with_reward
from evaluation import calibration, settling
from learner import later
from learner.config import Config
from learner.objectives.by_name import OBJECTIVES
from learner.prompts import training_prompts
from reports.summary import plural

FLOAT = 4  # bytes
# FLOPs of scoring one image, its prompt read anew, counted on the networks at their published sizes; others: unknown.
REWARDS = {
    "aesthetic": 162.03e9, "clip_score": 175.33e9, "hpsv2": 381.68e9, "imagereward": 137.78e9, "pickscore": 381.68e9,
}  # fmt: skip


def costs(config: Config) -> Costs:
    """Count on the meta device. Raises a BaseModelError if the model's configuration cannot be read."""
    parts = networks(config)
    flow, vae, tiny, latents = parts.flow, parts.vae, parts.tiny, parts.latents
    adapter = lora.named(parts.unet)
    return Costs(
        unet=_count(parts.output),
        unet_train=_count(parts.output, backward=True),
        decode=_count(lambda: vae.decode(latents).sample) if vae is not None else 0.0,
        tiny=_count(lambda: tiny.decode(latents).sample) if tiny is not None else None,
        reward=REWARDS.get(config.reward.name),
        flow=_count(parts.log_flow) if flow else 0.0,
        flow_train=_count(parts.log_flow, backward=True) if flow else 0.0,
        latent=latents.numel(),
        parameters=sum(p.numel() for p in parts.unet.parameters()) - sum(p.numel() for _, p in adapter),
        lora=sum(p.numel() for _, p in adapter),
        lora_b=sum(p.numel() for name, p in adapter if "lora_B" in name),
        flow_parameters=sum(p.numel() for p in flow.parameters()) if flow else 0,
        held=memory.count(config, parts),
    )


def work(config: Config, cost: Costs, ranks: int) -> Work:
    """An epoch of this config, exact but for thumbnails and rewards."""
    settings, n, count = config.rollout_settings(), config.sampler.steps, config.train.trajectories
    updates = config.train.updates_per_epoch
    ids = list(range(config.sampler.chunk_size))
    steps = (settings.end or n) - settings.first
    selected = settings.first + noise.select_transitions(
        settings.selection, settings.fraction, steps, config.run.seed, 0, ids
    )
    chosen = np.zeros((len(ids), n + 1), bool)
    np.put_along_axis(chosen, selected, True, axis=1)
    needed = states_with_reward(settings, chosen)
    scored = int(needed.sum()) * count // len(ids)
    trained = selected.shape[1] * count
    passes = passes_of(config)
    reference = 0
    if settings.forward_looking == "base":
        states = int(needed[:, :n].sum()) * count // len(ids)
        reference = states * (passes if settings.clean_prediction == "guided" else 1)
    fits = config.flow.fit_steps * config.flow.batch * ranks * config.steps_per_epoch
    stored = count * (n + 1) * cost.latent
    again = config.train.replay_updates / config.train.updates_per_epoch  # trained on once more
    step = passes * cost.unet_train + 2 * (cost.flow if config.flow.fit_steps else cost.flow_train)
    # Of an earlier policy's transitions, but those of the epoch's first update: what the regulariser holds them to.
    lagging = again + (1 - 1 / config.train.updates_per_epoch if config.train.max_staleness else 0)
    extra: float = OBJECTIVES[config.objective.kind].extra_passes(config.objective)
    extra += lagging if config.objective.regulariser else 0
    if config.needs.adjoint:  # the reference forward at every state from the window's first on, and back at all but it
        extra += (3 * (n - settings.first - 1) + 1) / selected.shape[1]
    if config.needs.fitted_flow:  # the reference forward at every state, then forward and back at all but the first
        extra += 4 + 1 / selected.shape[1]
    if config.learner.optimizer == "natural":  # rows of earlier epochs too; every step starts anew
        step *= config.learner.natural_epochs * updates
    held = len(later.steps(config)) * count * bool(config.objective.later_kl)  # behind the window
    whole = bool(config.train.replay_updates) and not config.needs.fitted_flow  # with the rollout's outputs
    there_and_back = 2 if config.needs.reward_gradients else 1
    ends = count * (1 + (settings.terminal is not None and not settings.image_only))
    inner = cost.decode if config.objective.forward_looking_decoder == "full" else (cost.tiny or 0.0)
    number = 2 if config.sampler.state_precision == "float16" else FLOAT
    clean = scored * cost.latent * (number + FLOAT * (there_and_back - 1))
    kept = number * (stored + whole * trained * cost.latent) + FLOAT * (
        config.needs.prepared_fields * trained * cost.latent + 2 * count * n
    )
    moments = 0 if config.learner.optimizer == "natural" else 2
    return Work(
        rollout=(count * n * passes + reference) * cost.unet,
        decoding=((scored - ends) * inner + ends * cost.decode) * there_and_back,
        scoring=scored * (cost.reward or 0.0) * there_and_back,
        training=trained * ((1 + again) * step + extra * passes * cost.unet)
        + fits * 2 * cost.flow_train
        + held * (1 + again) * passes * (cost.unet_train + cost.unet),
        evaluation=config.evaluation.images * (n * passes * cost.unet + cost.decode + (cost.reward or 0.0)),
        transitions=trained,
        states_scored=scored,
        trajectories=number * (stored + trained * cost.latent) + clean + FLOAT * 2 * count * n,
        checkpoint=FLOAT * ((3 + moments) * cost.lora + 3 * cost.flow_parameters) + config.kept_epochs * kept,
        thumbnails=count * 3 * config.run.thumbnail_pixels**2,
        version=FLOAT * cost.lora,
    )


def describe(
    config: Config, placement: Placement, resources: dict[str, float], place: str, counted: str | None = None,
    tflops: float | None = None, measure: bool = False, gpu: float | None = None,
) -> str:  # fmt: skip
    """The plan as text, one fact a line. `counted`: where the model is counted, if not at model.path; `tflops` that a
    device reaches, or `measure` it; `gpu`: GB of a GPU to fit into, where there is none as if there were one. Raises a
    NotMeasurable."""
    known = []
    if counted and Path(counted).is_relative_to(PUBLISHED):
        known = [f"{config.model.path}: no hub answers; by the configurations in {Path(counted).relative_to(ROOT)}"]
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": counted})})
    cost, sampler, updates = costs(config), config.sampler, config.steps_per_epoch
    if gpu and not resources.get("GPU"):
        config, placement, resources = fits.on_one_gpu(config, placement, resources)
    each = work(config, cost, placement.ranks.count)
    passes = passes_of(config)
    train, images, in_process = config.train, config.evaluation.images, config.run.runner == "inprocess"
    evaluations = len({*range(config.evaluation.every, train.epochs, config.evaluation.every), train.epochs}) + 1
    evaluations *= images > 0
    trajectories = train.epochs * train.trajectories
    total = train.epochs * each.flops + evaluations * each.evaluation
    scoring = "rewards not counted" if cost.reward is None else f"scoring {_flops(each.scoring)}"
    kept = min((config.run.keep_checkpoints or train.epochs) + evaluations, train.epochs + 1)
    disk = kept * each.checkpoint + train.epochs * each.thumbnails
    roles = {"sampler": placement.samplers, "reward actor": placement.scorers, "learner rank": placement.ranks}
    actors = [f"{places.counted(share.count, role)}, each {share}" for role, share in roles.items()]
    facts = {
        "run directory": [place],
        "cluster": [", ".join(f"{amount:g} {name}s" for name, amount in resources.items()) or "nothing found"],
        "actors": ["none: 1 sampler, 1 scorer, 1 learner in this process"] if in_process else actors,
        "an epoch": [
            f"{train.trajectories} trajectories of {sampler.steps} steps in chunks of {sampler.chunk_size}",
            f"{each.states_scored} states scored, {each.transitions} transitions trained on in "
            f"{plural(updates, 'update')}",
        ],
        "the run": [
            f"{plural(train.epochs, 'epoch')}, {trajectories} trajectories, {plural(train.epochs * updates, 'update')}",
            f"{plural(evaluations, 'evaluation')} of {plural(images, 'image')}",
        ],
        "model": [
            *known,
            f"{_number(cost.parameters)} parameters, LoRA {_number(cost.lora)}; a sample forward {_flops(cost.unet)}, "
            f"forward and back {_flops(cost.unet_train)}",
        ],
        "variance": [
            f"sampler.kernel=calibrated is measured before training: {plural(calibration.PICTURES, 'picture')}, "
            f"{_flops(calibration.PICTURES * passes * (max(STEPS, sampler.steps) + 2 * sampler.steps) * cost.unet)}"
        ] * config.uncalibrated,
        "window": _window(config, cost),
        "FLOPs": [
            f"an epoch: rollout {_flops(each.rollout)}, decoding {_flops(each.decoding)}, {scoring}, training "
            f"{_flops(each.training)}; an evaluation {_flops(each.evaluation)}",
            f"the run: {_flops(total)}",
        ],
        "time": [],
        "memory": memory.lines(config, cost.held),
        "object store": [] if in_process else [
            f"{_bytes(each.object_store)} an epoch: trajectories, clean predictions and scores "
            f"{_bytes(each.trajectories)}, adapter versions {_bytes(2 * each.version)}, a checkpoint's files "
            f"{_bytes(each.checkpoint)}"
            + f", of which {plural(config.kept_epochs, 'epoch')} to train on again" * (config.kept_epochs > 0),
            f"at most {_bytes(each.object_store + train.max_staleness * each.trajectories)} at a time "
            "(train.max_staleness + 1 epochs of trajectories)",
        ],
        "least squares": [_least_squares(config, cost, each, placement.ranks.count)] * (
            config.learner.optimizer == "natural"
        ),
        "disk": [
            f"{_bytes(each.checkpoint)} a checkpoint, at most {kept} kept; trajectories up to "
            f"{_bytes(each.thumbnails)} an epoch; at most {_bytes(disk)} in all",
        ],
    }  # fmt: skip
    if tflops or measure:
        rates = hours.measured(config, cost) if measure else hours.stated(tflops or 0)
        devices = resources.get("GPU") or resources.get("CPU") or 1.0
        took = hours.seconds(config, placement, devices, each, cost, rates)
        facts["time"] = hours.lines(config, took, evaluations, (rates.reward or cost.reward) is not None, rates)
    if gpu or torch.cuda.is_available():
        gpu = gpu or torch.cuda.get_device_properties(0).total_memory / 1e9
        facts[f"a GPU of {gpu:.3g} GB"] = fits.lines(config, placement, resources, gpu * 1e9, cost.held)
    rows = ((title if i == 0 else "", text) for title, texts in facts.items() for i, text in enumerate(texts))
    return "\n".join(f"{title:<26} {text}" for title, text in rows)


def _least_squares(config: Config, cost: Costs, each: Work, ranks: int) -> str:
    """A natural step's memory: rows in bfloat16, and the Gram matrix in float64, with its eigenvectors."""
    whole = config.needs.whole_trajectories and not config.needs.flow  # one residual a trajectory
    residuals = (config.train.trajectories if whole else each.transitions) * config.learner.natural_epochs
    rows, gram = 2 * residuals * cost.lora_b // ranks, 3 * 8 * residuals**2
    return f"{residuals} residuals, {_bytes(rows)} of rows and {_bytes(gram)} of their products on each learner rank"


def _window(config: Config, cost: Costs) -> list[str]:
    """Where objective.window=auto is still to be measured."""
    if config.objective.window != "auto":
        return []
    wanted = settling.continuations(config, training_prompts(config))
    each = wanted.transitions * passes_of(config) * cost.unet
    each += wanted.pictures * (cost.decode + (cost.reward or 0.0))
    return [
        f"objective.window=auto is measured before training, unless it has been for this model, prompts, reward and "
        f"sampler: {wanted.transitions} transitions, {plural(wanted.pictures, 'picture')}, {_flops(each)}",
        "until then all transitions are counted as trained",
    ]


def _count(forward: Callable[[], torch.Tensor], backward: bool = False) -> float:
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        output = forward()
        if backward:
            output.sum().backward()
    return float(counter.get_total_flops())


def _scaled(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} E{unit}"


def _number(value: int) -> str:
    return f"{value / 1e6:.5g} M"


_flops, _bytes = partial(_scaled, unit="FLOP"), partial(_scaled, unit="B")
