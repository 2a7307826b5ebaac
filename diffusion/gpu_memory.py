"""GPU memory: copies the host does not wait for, batches that fit, and errors that say what to make smaller."""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from diffusion.failures import RunFailure

USED = 0.8  # of free memory: the rest is for fragments, and peaks that a trial does not see


class OutOfMemory(RunFailure, RuntimeError):
    """A GPU is too small for what it was given; the message names the setting to make smaller."""


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor; to a GPU from page-locked memory, so that the next batch travels while the GPU works."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def release(device: torch.device) -> None:
    """Give cached memory back to the GPU, for the other processes that share it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def smaller(setting: str, value: object) -> Iterator[None]:
    """Raises OutOfMemory where torch does."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        text, remedy = " ".join(str(error).split()), "make it smaller"
        if value == 1:
            remedy = "leave more memory: fewer actors on the GPU, learner.gradient_checkpointing=true, or a larger GPU"
        raise OutOfMemory(f"{setting}={value} does not fit into GPU memory; {remedy} ({text[:200]})") from error


def largest_batch(trial: Callable[[int], object], device: torch.device, most: int, share: float = 1.0) -> int:
    """The largest power of two up to `most` that memory holds, from the peaks of trial(1) and trial(2); not even 1:
    torch.OutOfMemoryError. `share` is the part of the free memory that this process may have."""
    trial(1)  # libraries allocate their workspaces
    peaks = []
    with contextlib.suppress(torch.OutOfMemoryError):
        for batch in (1, 2):
            torch.cuda.reset_peak_memory_stats(device)
            trial(batch)
            peaks.append(torch.cuda.max_memory_allocated(device))
    torch.cuda.empty_cache()
    if len(peaks) < 2:
        return 1
    each = max(peaks[1] - peaks[0], 1)
    room = torch.cuda.memory_allocated(device) + share * USED * torch.cuda.mem_get_info(device)[0]
    fits = max(1, int((room - (peaks[0] - each)) // each))
    return min(most, 1 << (fits.bit_length() - 1))
