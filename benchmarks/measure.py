"""Timing, FLOPs and memory of pieces of work on one device, interleaved so that a drifting machine hits all alike."""

from __future__ import annotations

import contextlib
import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CEILING = "matmul"


@dataclass
class Part:
    """A piece of work: `amount` things (`unit`) in one `run`. `reset` comes before each run, untimed."""

    name: str
    unit: str
    amount: float
    dtype: torch.dtype
    run: Callable[[], Any]
    reset: Callable[[], Any] = lambda: None


@dataclass
class Measured:
    """A part's repeats, in order. Bytes on CUDA only: the most allocated during a run, and before it."""

    part: Part
    flops: float  # of one run
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    resident_bytes: int = 0

    @property
    def rate(self) -> float:
        """Units a second, from the median of the seconds."""
        return self.part.amount / median(self.seconds)

    def figures(self, ceiling: float | None) -> dict[str, Any]:
        """JSON types; `ceiling` is the FLOP/s of a matrix product of the part's dtype."""
        found: dict[str, Any] = {
            "unit": self.part.unit,
            "amount": self.part.amount,
            "dtype": str(self.part.dtype).removeprefix("torch."),
            "seconds": self.seconds,
            "rate": self.rate,
            "rates": [self.part.amount / one for one in self.seconds],
        }
        if self.flops:
            found |= {"flops": self.flops, "flops_per_second": self.flops / median(self.seconds)}
            if ceiling:
                found["of_ceiling"] = found["flops_per_second"] / ceiling
        if self.peak_bytes:
            found |= {"peak_bytes": self.peak_bytes, "resident_bytes": self.resident_bytes}
        return found


def measure(
    parts: Sequence[Part],
    repeats: int,
    device: torch.device,
    say: Callable[[str], None],
    left: Callable[[], float] = lambda: math.inf,
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Every part once to warm up, with its FLOPs counted, then `repeats` rounds of all of them, every other one
    backwards; after the first none is begun that, as long as the last, would need more than the seconds `left`. A part
    that does not fit into the device's memory is left out: the second result says so by name."""
    found: dict[str, Measured] = {}
    missing: dict[str, str] = {}
    for part in parts:
        say(f"warming up: {part.name}")
        part.reset()
        try:
            found[part.name] = Measured(part, count(part.run, device))
        except torch.OutOfMemoryError as error:
            missing[part.name] = f"out of memory: {str(error).splitlines()[0]}"
    last = 0.0
    for i in range(repeats):
        if i and last > left():
            break
        say(f"round {i + 1} of {repeats}")
        start, rounds = time.perf_counter(), list(found.values())
        for one in rounds if i % 2 == 0 else reversed(rounds):
            one.part.reset()
            clock(one, device)
        last = time.perf_counter() - start
    return found, missing


def count(run: Callable[[], Any], device: torch.device) -> float:
    """FLOPs of a run as torch counts them: products and convolutions, a multiplication and an addition are two."""
    # The counter does not know the CPU's fused attention; on the plain one it sees the products.
    plain = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with FlopCounterMode(display=False) as counter, plain:
        run()
    return float(counter.get_total_flops())


def clock(one: Measured, device: torch.device) -> None:
    """One more run. The clock is the host's, between two moments at which the device is idle: waiting for the host is
    part of it."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        one.resident_bytes = max(one.resident_bytes, torch.cuda.memory_allocated(device))
    start = time.perf_counter()
    one.part.run()
    if cuda:
        torch.cuda.synchronize(device)
    one.seconds.append(time.perf_counter() - start)
    if cuda:
        one.peak_bytes = max(one.peak_bytes, torch.cuda.max_memory_allocated(device))


def ceiling(device: torch.device, dtype: torch.dtype) -> Part:
    """A square matrix product, about the fastest that the device computes in this dtype, at the process's own
    precision settings (TF32 or not)."""
    size, times = (8192, 20) if device.type == "cuda" else (1024, 4)
    a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))

    def run() -> None:
        for _ in range(times):
            torch.mm(a, b)

    return Part(f"{CEILING} {str(dtype).removeprefix('torch.')}", "FLOP", 2.0 * size**3 * times, dtype, run)


def ratio(
    found: dict[str, Measured], above: Sequence[str], below: Sequence[str], ideal: bool = True
) -> dict[str, Any] | None:
    """Seconds of some parts over those of others, round by round, and their median; None where one is missing.
    With it, unless not `ideal`, the same of their FLOPs."""
    if any(name not in found for name in [*above, *below]):
        return None
    sums = [[sum(times) for times in zip(*(found[name].seconds for name in names), strict=True)]
            for names in (above, below)]  # fmt: skip
    each = [slow / fast for slow, fast in zip(*sums, strict=True)]
    result: dict[str, Any] = {"median": median(each), "each": each, "above": list(above), "below": list(below)}
    flops = [sum(found[name].flops for name in names) for names in (above, below)]
    if ideal and all(flops):
        result["of_flops"] = flops[0] / flops[1]
    return result


def processor() -> str:
    """Its name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def process_peak_bytes() -> int:
    """The most memory that this process ever had resident, everything in it."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
