"""`--plan`'s hours: the work that is counted, at a rate that is stated or measured here, by who works at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from cluster.placement import Placement
from commands.counts import Costs, Work
from commands.networks import networks, passes_of
from diffusion.failures import RunFailure
from learner import build
from learner.config import Config
from learner.prompts import training_prompts
from learner.update import MICRO_BATCH
from reports.summary import plural
from rewards import registry
from rewards.contract import call

ENOUGH = 5.0  # seconds of measuring, after which a part is not run again
FILLED = 0.1e12  # FLOPs of a transition forward and back that fill a CPU
MOST = 4  # runs of a part; the first warms up


class NotMeasurable(RunFailure):
    """What is to be timed does not fit into this machine's memory."""


@dataclass(frozen=True)
class Rates:
    """FLOP/s of one device, and what they rest on."""

    forward: float
    train: float
    decode: float
    reward: float | None  # seconds an image; None: its FLOPs, where they are known, at `forward`
    basis: str


@dataclass(frozen=True)
class Seconds:
    """Of an epoch, and of an evaluation."""

    sampling: float
    scoring: float
    training: float
    epoch: float
    evaluation: float


def stated(tflops: float) -> Rates:
    rate = tflops * 1e12
    return Rates(rate, rate, rate, None, f"{tflops:g} TFLOP/s a device in every part, as stated")


def measured(config: Config, cost: Costs) -> Rates:
    """Each part on one device of this machine, with random weights; the reward itself, if it can be made. Raises a
    NotMeasurable."""
    build.prepare_process(config)
    device, passes, held = build.device(config), passes_of(config), cost.held
    cuda = device == "cuda"
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    there, each = held.network + 2 * held.lora + held.flow + held.decoders, passes * max(held.train, held.forward)
    if there + max(each, held.decode) > free:
        raise NotMeasurable(
            f"--measure: {(there + max(each, held.decode)) / 1e9:.3g} GB are needed for a transition of "
            f"{config.model.path}, {free / 1e9:.3g} GB are free here; state a rate (--tflops)"
        )
    # Small networks and GPUs are not filled by one; a CPU with a large one is, for minutes.
    room = 0.8 * free - there if cuda else FILLED / (passes * cost.unet_train) * each
    count = max(1, min(config.learner.micro_batch or MICRO_BATCH, int(room // each)))
    parts = networks(config, count * passes, device)

    def forward() -> None:
        with torch.no_grad():
            parts.output()

    def decode() -> None:
        images = parts.vae.decode(parts.latents).sample
        if parts.latents.requires_grad:
            images.sum().backward()

    def seconds(step: Callable[[], object]) -> float:
        return _seconds(step, cuda)

    at_once = count * passes
    rates = at_once * cost.unet / seconds(forward), at_once * cost.unet_train / seconds(lambda: _back(parts.output()))
    with torch.set_grad_enabled(parts.latents.requires_grad):
        back = 2 if parts.latents.requires_grad else 1
        decoding = back * cost.decode / seconds(decode) if parts.vae is not None else rates[0]
    pixels = parts.latents.shape[-1] * (1 if parts.vae is None else 2 ** (len(parts.vae.config.block_out_channels) - 1))
    judged, missing = _reward_seconds(config, device, pixels, cuda)
    where = torch.cuda.get_device_name() if cuda else f"a CPU, {plural(torch.get_num_threads(), 'thread')}"
    said = [
        f"forward {rates[0] / 1e12:.3g}",
        f"and back {rates[1] / 1e12:.3g}",
        f"decoding {decoding / 1e12:.3g} TFLOP/s",
    ]
    said += [f"{config.reward.name} {judged:.3g} s an image" if judged is not None else missing]
    basis = f"timed here on {where}, {count} at once, random weights: {', '.join(said)}"
    return Rates(*rates, decoding, judged, basis)


def _back(output: torch.Tensor) -> None:
    output.float().sum().backward()


def _reward_seconds(config: Config, device: str, pixels: int, cuda: bool) -> tuple[float | None, str]:
    """An image's; else why there are none."""
    settings = config.reward
    try:
        reward = registry.load(settings.name, settings.weights, device, **settings.options)
        images, prompt = torch.rand(1, 3, pixels, pixels, device=device), training_prompts(config)[0]
        with torch.no_grad():
            return _seconds(lambda: call(reward, images, [prompt], ({},)), cuda), ""
    except Exception as error:  # no weights, no package, a reward that needs columns: whatever a user's code raises
        return None, f"{settings.name} could not be timed ({type(error).__name__})"


def _seconds(step: Callable[[], object], cuda: bool) -> float:
    """The fastest of a few runs, or of one that is long."""
    taken: list[float] = []
    while not taken or (len(taken) < MOST and sum(taken) < ENOUGH):
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def seconds(config: Config, placement: Placement, devices: float, each: Work, cost: Costs, rates: Rates) -> Seconds:
    """As the runners work: in process one part after the other; on Ray samplers and reward actors side by side, and
    beside them, with train.max_staleness, the learner ranks; actors that share devices share their speed. `devices` are
    the cluster's GPUs, or without any its CPUs."""
    there_and_back = 2 if config.needs.reward_gradients else 1
    judging = each.scoring / rates.forward
    if rates.reward is not None:
        judging = each.states_scored * there_and_back * rates.reward
    sampling, scoring = each.rollout / rates.forward, each.decoding / rates.decode + judging
    training, evaluation = each.training / rates.train, each.evaluation / rates.forward
    if rates.reward is not None and cost.reward is None:
        evaluation += config.evaluation.images * rates.reward
    if config.run.runner == "inprocess":
        return Seconds(sampling, scoring, training, sampling + scoring + training, evaluation)
    chunks = config.train.trajectories // config.sampler.chunk_size
    roles = placement.samplers, placement.scorers, placement.ranks
    shared = max(1.0, devices - sum(share.count * share.gpus for share in roles if share.gpus >= 1))
    work = [sampling, scoring, training]
    mine = list[float]()
    for share, needed, waits in zip(roles, work, (True, True, False), strict=True):
        has = share.count * share.gpus if share.gpus >= 1 else min(share.count, shared)
        rounds = math.ceil(chunks / share.count) * share.count / chunks if waits else 1.0  # a last one is not full
        mine.append(needed * rounds / has)

    def at_once(count: int) -> float:
        """Of the first `count` roles."""
        sharing = sum(needed for share, needed in zip(roles[:count], work, strict=False) if share.gpus < 1)
        return max(*mine[:count], sharing / shared)

    epoch = at_once(3) if config.train.max_staleness else at_once(2) + mine[2]
    return Seconds(mine[0], mine[1], mine[2], epoch, evaluation * mine[0] / sampling)


def lines(config: Config, took: Seconds, evaluations: int, known: bool, rates: Rates) -> list[str]:
    epochs = config.train.epochs
    total = epochs * took.epoch + evaluations * took.evaluation
    beside = (
        "one after the other"
        if config.run.runner == "inprocess"
        else ("all side by side" if config.train.max_staleness else "the first two side by side")
    )
    parts = f"sampling {_time(took.sampling)}, scoring {_time(took.scoring)}, training {_time(took.training)}"
    unknown = "" if known else f"; {config.reward.name}'s own time is not known, and not in it"
    return [
        f"an epoch {_time(took.epoch)}: {parts}, {beside}",
        f"the run {_time(total)}, of which evaluations {_time(evaluations * took.evaluation)}",
        f"by {rates.basis}{unknown}; start, transfers and disk are not in it",
    ]


def _time(seconds: float) -> str:
    for limit, unit, size in ((120, "s", 1), (7200, "min", 60)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 3600:.3g} h"
