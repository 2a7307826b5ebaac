"""Checks of what is between host and device: copies, the process group of one rank, and batches that are to fit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks import gpu_models
from benchmarks.gpu_worker import Day, release
from benchmarks.pipelines import StandInReward
from diffusion import gpu_memory
from diffusion.base_model import decode
from learner import process_group
from rewards.registry import UserReward
from rewards.scorer import Scorer

COPIES = 64


def copies(day: Day) -> None:
    """Arrays that travel from page-locked memory while the device works and their originals are gone, byte by byte."""
    rng, side, wrong = np.random.default_rng(0), 32 if day.tiny else 1024, 0
    busy = torch.randn(side, side, device=day.device)
    makers = (
        lambda: rng.standard_normal((side, side), np.float32), lambda: rng.integers(-9, 9, (3, side)),
        lambda: rng.standard_normal((side, 6)).astype(np.float16).T, lambda: rng.random((5, side)) < 0.5,
        lambda: np.zeros((0, 4), np.float32),
    )  # fmt: skip
    arrays = [makers[i % len(makers)]() for i in range(COPIES)]
    for _ in range(20):
        busy = torch.mm(busy, busy).clamp(-1, 1)
    travelled = [gpu_memory.to_device(array.copy(order="K"), day.device) for array in arrays]
    for array, found in zip(arrays, travelled, strict=True):
        back = found.cpu().numpy()
        wrong += back.shape != array.shape or back.dtype != array.dtype or back.tobytes() != array.tobytes()
    day.check("arrays that arrived otherwise", float(wrong), 0)
    day.tell(arrays=COPIES, bytes=sum(array.nbytes for array in arrays), page_locked=day.cuda)


def group(day: Day) -> None:
    """Collectives of a single rank through learner/process_group.py: NCCL on a GPU, else gloo."""
    backend = "nccl" if day.cuda else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        address = process_group.free_address("127.0.0.1", folder)
        dist.init_process_group(backend, address, timeout=timedelta(seconds=60), world_size=1, rank=0)
        try:
            parameters = [nn.Parameter(torch.zeros(shape, device=day.device)) for shape in ((3, 4), (5,), (1000, 10))]
            wanted = [torch.randn_like(parameter) for parameter in parameters]
            for parameter, gradient in zip(parameters, wanted, strict=True):
                parameter.grad = gradient.clone()
            process_group.average_gradients(parameters)
            apart = [(p.grad - one).abs().max().item() for p, one in zip(parameters, wanted, strict=True)]  # type: ignore[operator]
            day.check("averaged gradients", max(apart), 0)
            said = {"rows": [1.5, 2], "array": np.arange(3).tobytes()}
            day.check("objects gathered otherwise", float(process_group.gather(said) != [said]), 0)
            sent = torch.arange(10.0, device=day.device)
            dist.broadcast(sent, 0)
            day.check("broadcast", (sent - torch.arange(10.0, device=day.device)).abs().max().item(), 0)
            day.tell(backend=dist.get_backend())
        finally:
            dist.destroy_process_group()


def memory_fit(day: Day) -> None:
    """The micro-batch of a learner and the batch of a scorer that free memory is said to hold, at Stable Diffusion
    1.5's size: each is run, and nothing is left behind."""
    release(day.device)
    before = free(day)
    _learner_and_scorer(day)
    release(day.device)
    if day.cuda:
        after = free(day)
        day.tell(bytes_free_before=before, bytes_free_after=after)
        day.check("share of free memory not given back", 1 - after / before, 0.05)  # libraries keep workspaces


def _learner_and_scorer(day: Day) -> None:
    opened = gpu_models.open_model(day, gpu_models.configured(day, "sd15_aesthetic", "learner.micro_batch=null"))
    learner = gpu_models.new_learner(opened)
    size = learner.fit_micro_batch()
    _fits(day, "learner", size, lambda: learner._try_micro_batch(size))

    def decoder(latents: torch.Tensor) -> torch.Tensor:
        return (decode(opened.vae, latents.to(opened.model.dtype)).float() / 2 + 0.5).clamp(0, 1)

    scorer, shape = Scorer(decoder, UserReward("stand-in", StandInReward(tiny=day.tiny))), opened.model.latent_shape
    batch = scorer.fitting_batch(shape, gpu_models.PROMPT, day.device.type)
    batch = min(batch, 4) if day.tiny else batch
    latents = torch.zeros(batch, *shape, device=day.device)

    def judge() -> None:
        with torch.no_grad():
            scorer._judge(decoder(latents), [gpu_models.PROMPT] * batch)

    _fits(day, "scorer", batch, judge)


def _fits(day: Day, name: str, size: int, run: Callable[[], object]) -> None:
    """Raises torch.OutOfMemoryError where it does not."""
    if day.cuda:
        torch.cuda.reset_peak_memory_stats(day.device)
    for _ in range(2):
        run()
    found: dict[str, float] = {"batch": size}
    if day.cuda:
        found |= {"peak_bytes": torch.cuda.max_memory_allocated(day.device), "bytes_free": free(day)}
    day.tell(**{name: found})


def free(day: Day) -> int:
    return torch.cuda.mem_get_info(day.device)[0] if day.cuda else 0
