"""Parts of a GPU day that go wrong, one in each way; run by its worker."""

import os
import threading

import torch

from benchmarks.gpu_worker import Day, Skipped


def fine(day: Day) -> None:
    day.check("nothing", 0.0, 0.0)
    day.tell(speed={"rate": 2.0, "unit": "things", "seconds": [0.5]}, pid=os.getpid())


def raises(day: Day) -> None:
    day.tell(before="said")
    raise ValueError("it is\nbroken")


def without_memory(day: Day) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def wrong(day: Day) -> None:
    day.check("good", 0.1, 0.2)
    day.check("bad", 0.3, 0.2)
    day.check("nothing", float("nan"), 0.2)


def not_here(day: Day) -> None:
    raise Skipped("no such device")


def dies(day: Day) -> None:
    print("what libraries print is no message")
    day.tell(last="words")
    os.kill(os.getpid(), 9)


def hangs(day: Day) -> None:
    day.tell(before="said", pid=os.getpid())
    threading.Event().wait()
