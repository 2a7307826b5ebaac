"""The process of benchmarks/gpu.py that has the device: a part for each line of its standard input, messages on what
was its standard output. It ends when its input does."""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import processor
from records import environment


class Skipped(Exception):
    """What cannot be done on this device, and why."""


class Day:
    """What a part is given."""

    def __init__(self, device: torch.device, tiny: bool, send: Callable[[dict[str, Any]], None]) -> None:
        self.device, self.tiny, self._send = device, tiny, send
        self.cuda = device.type == "cuda"
        self.failures: list[str] = []
        self._end = math.inf

    def begin(self, seconds: float) -> None:
        self.failures, self._end = [], time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the part is killed."""
        return self._end - time.monotonic()

    def tell(self, **figures: Any) -> None:
        """Figures are written at once; a name told again replaces the one before."""
        self._send({"figures": figures})

    def check(self, name: str, value: float, limit: float) -> None:
        """It must be a number of at most `limit`."""
        fine = bool(value <= limit)  # a NaN is not
        if not fine:
            self.failures.append(f"{name} is {value:.3g}, more than {limit:.3g}")
        shown = value if math.isfinite(value) else str(value)
        self._send({"checks": {name: {"value": shown, "limit": limit, "passed": fine}}})


def run(day: Day, place: str, seconds: float) -> dict[str, Any]:
    """The last message of a part."""
    day.begin(seconds)
    try:
        module, _, name = place.partition(":")
        getattr(importlib.import_module(module), name)(day)
        status, reason = ("failed", "; ".join(day.failures)) if day.failures else ("ok", "")
    except Skipped as error:
        status, reason = "skipped", str(error)
    except torch.OutOfMemoryError as error:
        status, reason = "out of memory", _line(error)
    except Exception as error:
        traceback.print_exc()
        cause = error.__cause__
        if isinstance(cause, torch.OutOfMemoryError):  # diffusion.gpu_memory.OutOfMemory
            status, reason = "out of memory", _line(error)
        else:
            status, reason = "broken", f"{type(error).__name__}: {_line(error)}"
    release(day.device)
    return {"status": status, "reason": reason}


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def hello(device: torch.device) -> dict[str, Any]:
    """What the report says of the place."""
    facts = environment.facts()
    hardware: dict[str, Any] = {"device": device.type, "gpu": "", "cpu": processor(), "cores": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {
            "gpu": properties.name, "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}", "driver": _driver(), "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(), "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }  # fmt: skip
    names = (*environment.PACKAGES, "python")
    return {"hardware": hardware, "versions": {name: facts[name] for name in names}, "git_commit": facts["git_commit"]}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def main() -> None:
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no message
    asked: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            asked.put(line)
        os._exit(0)  # nobody is there any more

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    threading.Thread(target=listen, daemon=True).start()
    if sys.argv[1] == "cuda" and not torch.cuda.is_available():
        send({"refused": "--device: cuda was asked for, but torch finds none here"})
        return
    day = Day(torch.device(sys.argv[1]), "tiny" in sys.argv[2:], send)
    send(hello(day.device))
    while True:
        message = json.loads(asked.get(timeout=3600))  # by then its parent has ended it
        send(run(day, message["place"], message["seconds"]))


if __name__ == "__main__":
    from benchmarks import gpu_worker  # parts know its classes, which __main__'s are not

    gpu_worker.main()
