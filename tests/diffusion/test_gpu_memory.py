"""Batches that fit and messages about those that do not, on a pretended GPU."""

import numpy as np
import pytest
import torch

from diffusion import gpu_memory
from diffusion.gpu_memory import OutOfMemory

GB = 1 << 30


class Pretended:
    """torch.cuda with `total` bytes, of which networks hold `held`; a trial of b takes `fixed` + b x `each` more."""

    def __init__(self, monkeypatch, total: int, held: int, fixed: int, each: int) -> None:
        self.total, self.held, self.fixed, self.each = total, held, fixed, each
        self.peak, self.tried = held, []
        for name, fake in {
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.held),
            "max_memory_allocated": lambda device: self.peak,
            "memory_allocated": lambda device: self.held,
            "mem_get_info": lambda device: (self.total - self.held, self.total),
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def trial(self, batch: int) -> None:
        self.tried.append(batch)
        self.peak = max(self.peak, self.held + self.fixed + batch * self.each)
        if self.peak > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("total", "each", "share", "expected"),
    # 10 GB held, 1 GB whatever the batch, 80 % of the rest used: (80 - 10) * .8 - 1 = 55 GB for the batch.
    [(80, 1, 1.0, 32), (80, 2, 1.0, 16), (80, 0.1, 1.0, 64), (80, 1, 0.25, 8), (14, 1, 1.0, 2), (12, 1, 1.0, 1)],
)
def test_the_largest_power_of_two_that_fits(monkeypatch, total, each, share, expected):
    gpu = Pretended(monkeypatch, total * GB, 10 * GB, GB, int(each * GB))
    batch = gpu_memory.largest_batch(gpu.trial, torch.device("cuda"), 64, share)
    assert batch == expected and set(gpu.tried) <= {1, 2}
    gpu.peak = gpu.held
    gpu.trial(batch)


def test_what_does_not_fit_at_all_is_said_with_the_setting(monkeypatch):
    gpu = Pretended(monkeypatch, 10 * GB, 9 * GB, 2 * GB, GB)
    said = r"learner\.micro_batch=1 does not fit .* fewer actors .* allocate 2\.00 GiB"
    with pytest.raises(OutOfMemory, match=said), gpu_memory.smaller("learner.micro_batch", 1):
        gpu_memory.largest_batch(gpu.trial, torch.device("cuda"), 64)
    said = r"learner\.micro_batch=32 does not fit into GPU memory; make it smaller"
    with pytest.raises(OutOfMemory, match=said), gpu_memory.smaller("learner.micro_batch", 32):
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, bool])
def test_any_array_can_be_moved(dtype):
    for array in (np.arange(6).reshape(2, 3).T.astype(dtype), np.zeros((0, 4), dtype)):
        moved = gpu_memory.to_device(array, torch.device("cpu"))
        assert moved.shape == array.shape and np.array_equal(moved.numpy(), array)
