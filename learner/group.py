"""The data-parallel process group of the learner ranks: gloo on CPU, NCCL where every rank has a GPU."""

from __future__ import annotations

import datetime
import socket

import torch
import torch.distributed as dist


class GroupBroken(RuntimeError):
    """A peer is gone, or a collective timed out."""


def free_address(ip: str) -> str:
    """tcp:// URL of a free port on this node, where rank 0 will meet the others."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"tcp://{ip}:{probe.getsockname()[1]}"


def join(address: str, rank: int, world_size: int, seconds: float, whole_gpu: bool) -> None:
    """Join the group; every collective ends within `seconds` or raises. One rank needs no group."""
    if world_size == 1 or dist.is_initialized():
        return
    dist.init_process_group(
        "nccl" if whole_gpu and torch.cuda.is_available() else "gloo",
        init_method=address,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=seconds),
    )


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
