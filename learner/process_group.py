"""The data-parallel process group of the learner ranks and its collectives: gloo on CPU, NCCL where every rank has a
GPU. All are here, so that a broken group is told from a defect of the learner's own."""

import contextlib
import datetime
import re
import socket
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from diffusion.failures import RunFailure


class GroupBroken(RunFailure, RuntimeError):
    """Another rank is gone or did not answer in time: this one is sound, but the group must be made anew."""


def free_address(ip: str, folder: str | None = None) -> str:
    """Where rank 0 will meet the others: tcp:// URL of a free port on this node; or, where all share a `folder` on one
    machine, file:// URL of a new file in it, since on a port torch listens on every interface, whatever the address."""
    if folder:
        return f"file://{folder}/ranks-{uuid.uuid4().hex}"
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"tcp://{ip}:{probe.getsockname()[1]}"


def join(address: str, rank: int, world_size: int, seconds: float, whole_gpu: bool) -> None:
    """Join the group; every collective ends within `seconds` or raises GroupBroken, as does this: a process cannot try
    twice. One rank needs no group."""
    if world_size == 1 or dist.is_initialized():
        return
    backend = "nccl" if whole_gpu and torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(seconds=seconds)
    joined: Future[None] = Future()

    def meet() -> None:
        try:
            dist.init_process_group(backend, address, timeout=timeout, world_size=world_size, rank=rank)
            joined.set_result(None)
        except BaseException as error:
            joined.set_exception(error)

    # In a thread that can be left behind: for a rank 0 that never comes torch waits up to twice the timeout.
    threading.Thread(target=meet, daemon=True).start()
    with errors(f"joining the {world_size} learner ranks at {address}"):
        try:
            joined.result(seconds)
        except TimeoutError:
            raise RuntimeError(f"rank {rank}: not all came within {seconds:g} s") from None


@contextlib.contextmanager
def errors(what: str) -> Iterator[None]:
    """Around collectives and nothing else: gloo's RuntimeErrors, when a peer is gone or silent, become GroupBroken with
    the reason in the first line. (NCCL ends the process.)"""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(". This is typically")[0]
        raise GroupBroken(f"{what}: {re.sub(r'^.*gloo/transport.*?] ', '', reason)}") from error


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Every gradient becomes its mean over ranks, the same bits on each: a ring's sum depends on a number's place, and
    DistributedDataParallel changes places after the first backward pass. Raises GroupBroken."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / dist.get_world_size()
    with errors("averaging the gradients"):
        dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def gather(mine: Any) -> list[Any]:
    """Every rank's object, in the order of ranks. Raises GroupBroken."""
    if not dist.is_initialized():
        return [mine]
    parts: list[Any] = [None] * dist.get_world_size()
    with errors("gathering from ranks"):
        dist.all_gather_object(parts, mine)
    return parts
