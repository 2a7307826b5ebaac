"""Speed and memory on a device of what a run does at public models' sizes, beside plain diffusers and the published
algorithm; and the demo. Parts of benchmarks/gpu.py. FLOPs are torch's count, ceilings are matrix products measured
beside it."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from benchmarks import device as bench
from benchmarks import gpu_models
from benchmarks.gpu_models import Opened, configured, new_learner, of_batch, open_model
from benchmarks.gpu_worker import Day, Skipped, release
from benchmarks.measure import CEILING, Measured, Part, ceiling, clock, count, measure, ratio
from commands import memory
from commands.networks import networks, passes_of
from diffusion import lora
from diffusion.base_model import decode
from diffusion.rollout import Sampler
from learner.config import ROOT, Config, load_config
from learner.inprocess import InProcessRunner
from learner.objectives.base import anneal
from learner.prompts import evaluation_prompts, training_prompts
from learner.protocol.chunks import evaluation_chunks, training_chunks
from learner.protocol.ledger import Ledger
from learner.protocol.runner import Hooks

ROLLOUT, PIPELINE, DECODE = "rollout", "diffusers pipeline", "decode"
ROUNDS = 3
BATCHES = (4, 1)  # of a chunk: the first that fits
TINY_SERVICE = (
    "sampler.steps=2", "sampler.chunk_size=2", "train.trajectories=2", "prompts.per_prompt=1",
    "reward.options={tiny: true}", "flow.widths=[8,16]", "lora.rank=2",
)  # fmt: skip
TINY_DEMO = (
    "sampler.steps=4", "train.trajectories=8", "train.updates_per_epoch=1", "train.replay_updates=0", "lora.rank=2",
    "evaluation.images=8", "objective.window=[0,1]",
)  # fmt: skip


def rounds(day: Day, parts: Sequence[Part]) -> dict[str, Measured]:
    """All parts in turns, while there is time; told as they are. Raises what the first that does not fit into memory
    does, if nothing was measured."""
    found, missing = measure(parts, 1 if day.tiny else ROUNDS, day.device, lambda text: None, lambda: day.left() / 2)
    figures = shown(found)
    day.tell(**figures, **missing)
    if all(name.startswith(CEILING) for name in found):
        raise torch.OutOfMemoryError("; ".join(missing.values()))
    return found


def shown(found: dict[str, Measured]) -> dict[str, Any]:
    """Figures by part."""
    ceilings = {
        one.part.dtype: one.flops / median(one.seconds) for name, one in found.items() if name.startswith(CEILING)
    }
    return {name: one.figures(ceilings.get(one.part.dtype)) for name, one in found.items()}


def service(day: Day) -> None:
    """The whole service's parts at Stable Diffusion 1.5's size, beside the pipeline and the published algorithm: a
    benchmarks/device.py of a few steps."""
    size, steps = ("tiny", TINY_SERVICE) if day.tiny else ("full", ("sampler.steps=5", "model.channels_last=true"))
    dtype = "model.dtype=float32" if day.tiny else "model.dtype=bfloat16"
    said = ["--sd15", size, "--device", day.device.type, "--objectives", "none", "--repeats", "1" if day.tiny else "2"]
    args = bench.parsed([*said, "--seconds", str(day.left() / 2), dtype, *steps])
    with tempfile.TemporaryDirectory() as folder:
        report = bench.run(args, Path(folder))
    times = {name: one["median"] for name, one in report["ratios"].items()}
    day.tell(**report["parts"], **{"times as fast": times}, **report["not_measured"])


def sd15(day: Day) -> None:
    model(day, "sd15_aesthetic", "learner.gradient_checkpointing=true")


def sdxl(day: Day) -> None:
    model(day, "sdxl_pickscore")


def sd35(day: Day) -> None:
    model(day, "sd35_medium_pickscore")


def flux(day: Day) -> None:
    model(day, "flux_dev_pickscore")


def model(day: Day, preset: str, *more: str) -> None:
    """Rollout beside diffusers' own loop, decoding, a learner's forward and backward pass of one transition and of the
    micro-batch that is said to fit; memory beside what --plan counts."""
    before = torch.cuda.memory_allocated(day.device) if day.cuda else 0
    opened = open_model(day, config := configured(day, preset, *more))
    resident = torch.cuda.memory_allocated(day.device) - before if day.cuda else 0
    learner = new_learner(opened)
    latents = torch.zeros(1, *opened.model.latent_shape, device=day.device, dtype=opened.model.dtype)

    def decoded() -> None:
        with torch.no_grad():
            decode(opened.vae, latents)

    dtype = opened.model.dtype
    common = [ceiling(day.device, dtype), Part(DECODE, "images", 1, dtype, decoded), learning(learner, 1)]
    for size in BATCHES:
        opened.config = configured_again(config, size)
        try:
            found = rounds(day, [*(common if size == BATCHES[0] else ()), *rollouts(day, opened, size)])
        except torch.OutOfMemoryError:
            if size == BATCHES[-1]:
                raise
            release(day.device)
            continue
        if ROLLOUT in found:
            break
    if compared := ratio(found, [PIPELINE], [ROLLOUT]):
        day.tell(**{"rollout, times as fast as diffusers": compared["median"]})
    each = median(found[name].seconds) if (name := "learn, batch 1") in found else 0.0
    fitting(day, learner, each)
    counted(day, opened.config, found, resident)


def configured_again(config: Config, size: int) -> Config:
    return load_config(config.model_dump(mode="json"), of_batch(size))


def rollouts(day: Day, opened: Opened, size: int) -> list[Part]:
    """The project's, and the same number of passes by the pipeline; latents alone, by both."""
    config, network = opened.config, opened.model
    sampler, chunk = Sampler(network, config.rollout_settings()), training_chunks(config, [gpu_models.PROMPT], 0)[0]
    snapshot, pipeline = lora.snapshot(network.unet, 0), gpu_models.plain_pipeline(opened)
    arguments = gpu_models.plain_call(opened, chunk.prompts)
    return [
        Part(ROLLOUT, "images", size, network.dtype, lambda: sampler.sample(chunk, snapshot)),
        Part(PIPELINE, "images", size, network.dtype, lambda: pipeline(**arguments)),
    ]


def learning(learner: Any, size: int) -> Part:
    return Part(
        f"learn, batch {size}", "transitions", size, learner.model.dtype, lambda: learner._try_micro_batch(size)
    )


def fitting(day: Day, learner: Any, each: float) -> None:
    """The micro-batch that is said to fit, at work. Once: on the largest networks it takes seconds."""
    size = learner.fit_micro_batch()
    if 1.5 * size * each > day.left():
        day.tell(**{"fitting micro-batch": {"size": size, "not run": f"{size} times {each:.2g} s are too many"}})
        return
    release(day.device)
    one = Measured(learning(learner, size), 0)
    clock(one, day.device)
    free = torch.cuda.mem_get_info(day.device)[0] if day.cuda else 0
    day.tell(**{"fitting micro-batch": {"size": size, "bytes_free": free, **one.figures(None)}})


def counted(day: Day, config: Config, found: dict[str, Measured], resident: int) -> None:
    """What commands/memory.py counts of the same, and on a GPU what was measured over it."""
    parts = networks(config)
    held = memory.count(config, parts)
    passes, size = passes_of(config), config.sampler.chunk_size
    network = held.network + held.lora + held.decoders
    flow = 2 * held.flow_train
    sums = {"networks": network, "rollout": size * passes * held.forward, "decode": held.decode,
            "learn, batch 1": passes * held.train + flow + held.lora + held.flow}  # fmt: skip
    rows: dict[str, Any] = {name: {"counted_bytes": value} for name, value in sums.items()}
    for name, row in rows.items():
        measured = resident if name == "networks" else 0
        if name in found and found[name].peak_bytes:
            measured = found[name].peak_bytes - found[name].resident_bytes
        if measured:
            row |= {"measured_bytes": measured, "measured over counted": measured / row["counted_bytes"]}
    day.tell(memory=rows)


def tf32(day: Day) -> None:
    """float32 at Stable Diffusion 1.5's size, with products and convolutions in TF32 and without."""
    opened = open_model(day, configured(day, "sd15_aesthetic", "model.dtype=float32", "model.channels_last=false"))
    learner = new_learner(opened)
    for name, setting in (("float32", False), ("TF32", True)):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = setting
        parts = [ceiling(day.device, torch.float32), rollouts(day, opened, BATCHES[0])[0], learning(learner, 1)]
        found, missing = measure(parts, 1 if day.tiny else 2, day.device, lambda text: None, lambda: day.left() / 3)
        day.tell(**{name: shown(found) | missing})


def compiled_sd15(day: Day) -> None:
    compiled(day, "sd15_aesthetic", "model.dtype=bfloat16")


def compiled_sd35(day: Day) -> None:
    compiled(day, "sd35_medium_pickscore")


def compiled(day: Day, preset: str, *more: str) -> None:
    """The same passes before and after torch.compile of repeated blocks, and the seconds that it took."""
    opened = open_model(day, configured(day, preset, *more))
    sampling, training = rollouts(day, opened, BATCHES[0])[0], learning(new_learner(opened), 1)
    before = {part.name: Measured(part, count(part.run, day.device)) for part in (sampling, training)}
    after = {name: Measured(one.part, one.flops) for name, one in before.items()}
    timed(day, "as it is", before)
    # Inductor's C++ would take minutes on a CPU.
    quick = mock.patch("torch.compile", partial(torch.compile, backend="aot_eager"))
    with quick if day.tiny else contextlib.nullcontext():
        opened.model.speed_up(compiled=True)
    for part in (sampling, training):
        start = time.perf_counter()
        part.run()
        day.tell(**{f"first {part.name}, seconds": time.perf_counter() - start})
        if day.left() < 10 * median(before[part.name].seconds):
            raise Skipped("compiled, but no time was left to measure it")
    timed(day, "compiled", after)
    gain = {name: median(before[name].seconds) / median(after[name].seconds) for name in before}
    day.tell(**{"times as fast compiled": gain})


def timed(day: Day, name: str, parts: dict[str, Measured]) -> None:
    for _ in range(1 if day.tiny else ROUNDS):
        for one in parts.values():
            clock(one, day.device)
    day.tell(**{name: {key: one.figures(None) for key, one in parts.items()}})


def demo(day: Day) -> None:
    """configs/demo.yaml for three epochs: the reward of its evaluation images, before and after."""
    settings = [f"model.device={day.device.type}", "run.runner=inprocess", "train.epochs=3"]
    config = load_config(ROOT / "configs/demo.yaml", [*settings, *(TINY_DEMO if day.tiny else ())])
    begun = time.perf_counter()
    runner = InProcessRunner(config, None, Hooks())
    prompts, fixed = training_prompts(config), evaluation_chunks(config, evaluation_prompts(config))

    def judged() -> float:
        rewards = [reward for scores in runner.evaluate(fixed) for reward in scores.rewards[:, -1].tolist()]
        return sum(rewards) / len(rewards)

    before = judged()
    day.tell(**{"reward before": before, "loading and evaluating, seconds": time.perf_counter() - begun})
    epochs = range(config.train.epochs)
    runner.begin(lambda epoch: training_chunks(config, prompts, epoch), epochs, ledger := Ledger(None))
    for epoch in epochs:
        start = time.perf_counter()
        beta = anneal(config.objective.beta, epoch, config.train.epochs, config.objective.anneal_fraction)
        result = runner.train_epoch(epoch, beta, 0.0)
        ledger.close(epoch)
        runner.closed(epoch)
        seconds = time.perf_counter() - start
        trained = {"sample": result.sample_seconds, "score": result.score_seconds, "train": result.train_seconds}
        day.tell(**{f"epoch {epoch}, seconds": {"all": seconds, **trained}})
    after = judged()
    day.tell(**{"reward after": after, "gain": after - before})
