"""`--plan`'s answer to "does it fit": on a GPU of a given size, by the rules by which a run finds its batches.

What memory.py counts, and for each process what CUDA takes. Of what is then free, a fifth is left, as a run leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.nodes import Node
from cluster.placement import Placement, Share, place_for
from commands import memory
from commands.memory import FLOAT, Memory
from commands.networks import networks, passes_of
from diffusion.gpu_memory import USED
from learner import embeddings
from learner.config import Config
from learner.update import MOST
from reports.summary import plural
from rewards import scorer

UNITS = {"sampler": "a sample", "reward actor": "an image", "learner rank": "a transition"}
SETTINGS = {"sampler": "sampler.chunk_size", "reward actor": "reward.batch", "learner rank": "learner.micro_batch"}
ROLES = tuple(SETTINGS)
CONTEXT = 500_000_000  # bytes that CUDA and its libraries take, a process
Counts = Mapping[str, int]  # of processes, by role


@dataclass(frozen=True)
class Answer:
    """Of one GPU and the processes on it."""

    text: tuple[str, ...]
    fits: dict[str, int]  # most at once, by role
    wrong: tuple[str, ...]  # roles without room for one, or for what the config gives
    peak: float  # bytes
    least: float  # bytes of a GPU that would do


def on_one_gpu(
    config: Config, placement: Placement, resources: dict[str, float]
) -> tuple[Config, Placement, dict[str, float]]:
    """As if this machine had one. Raises a PlacementError."""
    resources = {**resources, "GPU": 1.0}
    config = _changed(config, {"model": {"device": "auto"}})
    if config.run.runner != "inprocess":
        placement = place_for(config, [Node("a GPU", max(4.0, resources.get("CPU", 0.0)), 1.0)])
    return config, placement, resources


def lines(config: Config, placement: Placement, resources: Mapping[str, float], size: float, held: Memory) -> list[str]:
    """Of GPUs of `size` bytes."""
    said: list[str] = []
    if held.encoders >= FLOAT * embeddings.LARGE:
        least = held.encoders + CONTEXT
        fits = "fit" if least <= size else f"do not fit: they take a GPU of {_gb(least)}, or model.device=cpu"
        said.append(f"text encoders, alone and before training: {_gb(held.encoders)}, {fits}")
    for counts in _gpus(config, placement, resources):
        answer = judge(config, placement, counts, size, held)
        said += answer.text
        if answer.wrong:
            said.append(_remedy(config, placement, resources, size, held, answer))
    return said


def _gpus(config: Config, placement: Placement, resources: Mapping[str, float]) -> list[Counts]:
    """Processes on the fullest GPU of each kind."""
    if config.run.runner == "inprocess":
        return [dict.fromkeys(ROLES, 1)]
    shares = dict(zip(ROLES, (placement.samplers, placement.scorers, placement.ranks), strict=True))
    whole = {role: share for role, share in shares.items() if share.gpus >= 1}
    left = max(1.0, resources.get("GPU", 0.0) - sum(share.count * share.gpus for share in whole.values()))
    parts = {role: math.ceil(share.count / left) for role, share in shares.items() if 0 < share.gpus < 1}
    return [*([parts] if parts else []), *({role: 1} for role in whole)]


def judge(config: Config, placement: Placement, counts: Counts, size: float, held: Memory) -> Answer:
    """What fits beside all that stays in memory. The sampler's chunk is given, the other batches are found."""
    alone, stale = config.run.runner == "inprocess", config.train.max_staleness > 0
    stays, work = _stays(config, held), _work(config, held)
    most = {
        "sampler": config.sampler.chunk_size,
        "reward actor": config.reward.batch or scorer.MOST,
        "learner rank": config.learner.micro_batch or MOST,
    }
    given = {
        "sampler": True,
        "reward actor": bool(config.reward.batch),
        "learner rank": bool(config.learner.micro_batch),
    }
    processes = 1 if alone else sum(counts.values())
    fixed = sum(count * stays[role] for role, count in counts.items()) + CONTEXT * processes
    if alone:  # the learner borrows what is frozen
        fixed -= stays["sampler"] - held.lora
    free, parts = USED * max(0.0, size - fixed), _parts(config, placement, counts)
    text, fits, wrong, used, least = list[str](), dict[str, int](), list[str](), dict[str, float](), 0.0
    for role in counts:
        base, each = work[role]
        room, wanted = parts[role] * free, most[role] if given[role] else 1
        fits[role] = int(max(0.0, room - base) // each)
        least = max(least, (base + wanted * each) / parts[role])
        found = wanted if given[role] else min(most[role], 1 << max(0, fits[role].bit_length() - 1))
        verdict = f"fits (at most {fits[role]})" if fits[role] >= wanted else "does not fit"
        text.append(f"{role}: {_gb(each)} {UNITS[role]}, {_gb(room)} free for it: {SETTINGS[role]}={found} {verdict}")
        if fits[role] < wanted:
            wrong.append(role)
        used[role] = counts[role] * (base + found * each)
    before = [used[role] for role in counts if role != "learner rank"]
    peaks = {"sampling and scoring": max(before, default=0.0) if alone else sum(before)}
    peaks["training"] = used.get("learner rank", 0.0)
    if stale and not alone:
        peaks = {"sampling, scoring and training at once": sum(peaks.values())}
    at = max(peaks, key=lambda name: peaks[name])
    who = "all in one process" if alone else ", ".join(plural(count, role) for role, count in counts.items())
    head = f"{who}: {_gb(fixed)} stay, of which {_gb(CONTEXT * processes)} are CUDA's own"
    peak = "" if wrong else f"; at most {_gb(fixed + peaks[at])}, in {at}"
    return Answer((head + peak, *text), fits, tuple(wrong), fixed + peaks[at], fixed + least / USED)


def _parts(config: Config, placement: Placement, counts: Counts) -> dict[str, float]:
    """Of free memory, each process's, as the runners hand it out. A sampler, which asks for none, has what others
    leave; learner ranks have all of it while the others rest."""
    if config.run.runner == "inprocess":
        return dict.fromkeys(counts, 1.0)
    parts = {"reward actor": min(1.0, placement.scorers.gpus or 1.0), "learner rank": 1 / counts.get("learner rank", 1)}
    beside = ["reward actor"]
    if config.train.max_staleness:
        parts["learner rank"] = min(1.0, placement.ranks.gpus or 1.0)
        beside.append("learner rank")
    taken = sum(counts.get(role, 0) * parts[role] for role in beside)
    parts["sampler"] = max(0.05, 1 - taken) / counts.get("sampler", 1)
    return {role: parts[role] for role in counts}


def _work(config: Config, held: Memory) -> dict[str, tuple[float, float]]:
    """Bytes at work whatever the batch, and with each of it."""
    passes, flow = passes_of(config), 2 * held.flow_train  # at both ends of a transition
    fits = config.flow.batch * flow if config.flow.fit_steps or config.flow.warmup_steps else 0
    each = passes * held.train + (0 if config.flow.fit_steps else flow)
    return {
        "sampler": (0.0, passes * held.forward),
        "reward actor": (0.0, max(1, held.decode)),
        "learner rank": (max(0.0, fits - each), each),
    }


def _stays(config: Config, held: Memory) -> dict[str, float]:
    """Bytes that a process holds for good."""
    network = held.network + held.lora + (0 if held.encoders >= FLOAT * embeddings.LARGE else held.encoders)
    moments = 0 if config.learner.optimizer == "natural" else 2 * held.lora
    return {
        "sampler": network,
        "reward actor": held.decoders + (held.reward or 0),
        "learner rank": network + held.lora + moments + 4 * held.flow,
    }


def _changes(config: Config, answer: Answer) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Settings that save memory, what changes least first."""
    wrong, chunk = answer.wrong, 1 << max(0, answer.fits.get("sampler", 1).bit_length() - 1)
    if "learner rank" in wrong and not config.learner.gradient_checkpointing:
        yield "learner.gradient_checkpointing=true", {"learner": {"gradient_checkpointing": True}}
    if "learner rank" in wrong and (config.learner.micro_batch or 1) > 1:
        yield "learner.micro_batch=null", {"learner": {"micro_batch": None}}
    if "reward actor" in wrong and (config.reward.batch or 1) > 1:
        yield "reward.batch=null", {"reward": {"batch": None}}
    if "sampler" in wrong and config.sampler.chunk_size > 1:
        yield f"sampler.chunk_size={chunk}", {"sampler": {"chunk_size": chunk}}
    if config.model.dtype != "bfloat16":
        yield "model.dtype=bfloat16", {"model": {"dtype": "bfloat16"}}
    if config.run.runner != "inprocess":
        if config.model.device == "auto" and config.reward.gpus != 0:
            yield "reward.gpus=0 (decoding and scoring on CPUs)", {"reward": {"gpus": 0.0}}
        yield "run.runner=inprocess", {"run": {"runner": "inprocess"}}


def _changed(config: Config, changes: Mapping[str, Mapping[str, Any]]) -> Config:
    sections = {name: getattr(config, name).model_copy(update=dict(values)) for name, values in changes.items()}
    return config.model_copy(update=sections)


def _remedy(
    config: Config, placement: Placement, resources: Mapping[str, float], size: float, held: Memory, answer: Answer
) -> str:
    """What makes it fit: one setting, or the first of them together; else what GPU there would have to be."""

    def after(changed: Config) -> Answer:
        place, counted = placement, held
        if changed.reward.gpus != config.reward.gpus and changed.run.runner != "inprocess":
            place = place_for(changed, [Node("the GPUs", 4 * resources["GPU"], resources["GPU"])])
        if (changed.learner, changed.model) != (config.learner, config.model):
            counted = memory.count(changed, networks(changed))
        answers = [judge(changed, place, gpu, size, counted) for gpu in _gpus(changed, place, resources)]
        return max(answers, key=lambda each: (len(each.wrong), each.least))

    options = list(_changes(config, answer))
    for name, change in options:
        if not after(_changed(config, change)).wrong:
            return f"does not fit: set {name}"
    changed, names, best = config, list[str](), answer
    for name, change in options:
        changed = _changed(changed, change)
        names.append(name)
        best = after(changed)
        if not best.wrong:
            return f"does not fit: set {', '.join(names)}"
    whole = Placement(Share(1, gpus=1.0), Share(1, gpus=1.0), Share(1, gpus=1.0))
    alone = {role: judge(_changed(config, {"run": {"runner": "ray"}}), whole, {role: 1}, size, held) for role in ROLES}
    saved = f", or with {', '.join(names)} one of {_gb(best.least)}" if names else ""
    return (
        f"does not fit: it takes a GPU of {_gb(answer.least)}{saved}; with a GPU for each process "
        f"{', '.join(f'{role} {_gb(each.least)}' for role, each in alone.items())}. Fewer model.pixels take less at "
        "work; weights are neither offloaded nor quantised here"
    )


def _gb(value: float) -> str:
    return f"{value / 1e9:.3g} GB"
