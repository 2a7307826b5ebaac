"""The data-parallel process group of the learner ranks: gloo on CPU, NCCL where every rank has a GPU.

Every collective of the learner is here, so that a group that is broken is told from a defect of the learner's own.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffusion.failures import RunFailure


class GroupBroken(RunFailure, RuntimeError):
    """Another rank is gone or did not answer in time: this one is sound, but the group must be made anew."""


def free_address(ip: str) -> str:
    """tcp:// URL of a free port on this node, where rank 0 will meet the others."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"tcp://{ip}:{probe.getsockname()[1]}"


def join(address: str, rank: int, world_size: int, seconds: float, whole_gpu: bool) -> None:
    """Join the group; every collective ends within `seconds` or raises. One rank needs no group.

    Raises:
        GroupBroken: not all ranks came within `seconds`; this process cannot try again.
    """
    if world_size == 1 or dist.is_initialized():
        return
    what = f"joining the {world_size} learner ranks at {address}"
    backend = "nccl" if whole_gpu and torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(seconds=seconds)
    failures: list[BaseException] = []

    def meet() -> None:
        try:
            with errors(what):
                dist.init_process_group(
                    backend, init_method=address, rank=rank, world_size=world_size, timeout=timeout
                )  # fmt: skip
        except BaseException as error:  # raised where it is waited for
            failures.append(error)

    # In a thread that can be left behind: to reach a rank 0 that never comes, torch waits ever longer between its
    # tries, in all up to twice the timeout.
    meeting = threading.Thread(target=meet, daemon=True)
    meeting.start()
    meeting.join(seconds)
    if failures:
        raise failures[0]
    if meeting.is_alive():
        raise GroupBroken(f"{what}, rank {rank}: not all came within {seconds:g} s")


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def errors(what: str) -> Iterator[None]:
    """Around collectives and nothing else: gloo raises plain RuntimeErrors when a peer is gone or silent. (NCCL ends
    the process.)

    Raises:
        GroupBroken: with torch's reason in its first line.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].split(". This is typically")[0]
        raise GroupBroken(f"{what}: {re.sub(r'^.*gloo/transport.*?] ', '', reason)}") from error


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Every gradient becomes its mean over ranks, the same bits on each.

    In one buffer that is always laid out the same: a ring's sum depends on a number's place in it, and
    DistributedDataParallel changes places after the first backward pass, so that a restart would have other last bits.

    Raises:
        GroupBroken: a rank is gone or silent.
    """
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / dist.get_world_size()
    with errors("averaging the gradients"):
        dist.all_reduce(flat)
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def reduce(numbers: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """`numbers` summed over ranks (or their minimum ...), in place; raises as average_gradients."""
    if dist.is_initialized():
        with errors("adding up over ranks"):
            dist.all_reduce(numbers, operation)
    return numbers


def gather(mine: Any) -> list[Any]:
    """Every rank's object, in the order of ranks; raises as average_gradients."""
    if not dist.is_initialized():
        return [mine]
    parts: list[Any] = [None] * dist.get_world_size()
    with errors("gathering from ranks"):
        dist.all_gather_object(parts, mine)
    return parts


def mean_rows(
    rows: Sequence[dict[str, float]], device: torch.device
) -> tuple[dict[str, float], list[dict[str, float]]]:  # fmt: skip
    """Means over ranks, of all rows and of each, by name; raises as average_gradients. All ranks have the same names;
    a row need not have all of them."""
    names = sorted({name for row in rows for name in row})
    table = torch.tensor([[row.get(name, math.nan) for name in names] for row in rows], dtype=torch.float64)
    table = reduce(table.to(device)) / (dist.get_world_size() if dist.is_initialized() else 1)
    each = [dict(zip(names, row, strict=True)) for row in table.tolist()]
    each = [{name: value for name, value in row.items() if not math.isnan(value)} for row in each]
    return dict(zip(names, table.nanmean(0).tolist(), strict=True)), each
