"""The GPU day: correctness, speed and memory on one GPU, and a short run of the demo, within a budget of seconds.

    python -m benchmarks.gpu [--seconds 480] [--device cuda] [--output F.json] [--parts NAME ...]
    python -m benchmarks.gpu --tiny --device cpu     every branch of it, small; the figures mean nothing

Its parts run in order of worth in a process of their own, which is killed where a part exceeds its time and made anew
where a part broke it. JSON and Markdown are written after every figure: a killed script leaves what it had.
docs/performance.md says what each part is. Exit status 1: a check failed or was not done; 2: bad input, in one line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import gpu_report
from learner.config import ROOT

RESULTS = Path(__file__).parent / "results"
SECONDS = 480.0
START = 150.0  # seconds until torch is there and has found the device
LEAST = 1.0  # left for a part to be begun
AS_SAID = ("ok", "failed", "skipped", "out of memory")  # after these the process is sound


@dataclass(frozen=True)
class Part:
    """`place` is a function of a worker's Day, module:name; `seconds` are its own where the budget is SECONDS."""

    name: str
    place: str
    seconds: float
    check: bool = False  # it must be `ok`, or say why it cannot be done here


PARTS = (
    Part("kernels", "benchmarks.gpu_checks:kernels", 30, True),
    Part("objectives", "benchmarks.gpu_checks:objectives", 60, True),
    Part("network", "benchmarks.gpu_network:network", 30, True),
    Part("bf16 ratios", "benchmarks.gpu_network:ratios", 30, True),
    Part("copies", "benchmarks.gpu_process:copies", 20, True),
    Part("process group", "benchmarks.gpu_process:group", 40, True),
    Part("memory fit", "benchmarks.gpu_process:memory_fit", 60, True),
    Part("service at SD1.5's size", "benchmarks.gpu_speed:service", 120),
    Part("SD1.5", "benchmarks.gpu_speed:sd15", 60),
    Part("SDXL", "benchmarks.gpu_speed:sdxl", 60),
    Part("SD3.5-medium", "benchmarks.gpu_speed:sd35", 60),
    Part("FLUX", "benchmarks.gpu_speed:flux", 90),
    Part("demo", "benchmarks.gpu_speed:demo", 90),
    Part("TF32", "benchmarks.gpu_speed:tf32", 40),
    Part("compiled SD1.5", "benchmarks.gpu_speed:compiled_sd15", 100),
    Part("compiled SD3.5-medium", "benchmarks.gpu_speed:compiled_sd35", 100),
)


class BadArguments(ValueError):
    """In one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadArguments(message)


class Worker:
    """A process that runs parts, and all that it starts. It ends with this one, which holds the other end of its
    standard input."""

    def __init__(self, device: str, tiny: bool) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu_worker", device, *["tiny"] * tiny]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def hear(self, seconds: float) -> dict[str, Any]:
        """The next message. Raises TimeoutError, or EOFError with how the process ended."""
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            status = self.process.wait(10)
            raise EOFError(f"its process ended by signal {-status}" if status < 0 else f"its process ended: {status}")
        return json.loads(line)

    def ask(self, **message: Any) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=60)


def run(parts: Sequence[Part], device: str, tiny: bool, seconds: float, output: Path | None) -> dict[str, Any]:
    """The report, written as docs/performance.md says. Raises BadArguments where the device is not there."""
    end, scale = time.monotonic() + seconds, max(1.0, seconds / SECONDS)
    report = gpu_report.begin([part.name for part in parts], seconds, tiny)
    worker: Worker | None = None
    failed = 0  # processes in a row that did not start
    try:
        for part in parts:
            entry = report["parts"][part.name]
            entry["check"] = part.check
            if worker is None and failed < 2 and end - time.monotonic() > LEAST:
                try:
                    worker = Worker(device, tiny)
                    hello = worker.hear(min(START, end - time.monotonic()))
                    if "refused" in hello:
                        raise BadArguments(hello["refused"])
                    report |= hello
                    output, failed = output or _place(report), 0
                except (EOFError, TimeoutError) as error:
                    if worker is not None:
                        worker.kill()
                    worker, failed = None, failed + 1
                    entry |= {"status": "broken", "reason": f"torch did not start: {error or 'not in time'}"}
            allowed = min(part.seconds * scale, end - time.monotonic())
            if worker is None and entry["status"] == "not begun":
                entry["reason"] = "torch did not start" if failed else f"no time was left of --seconds {seconds:g}"
            elif worker is None:
                pass
            elif allowed < LEAST:
                entry["reason"] = f"no time was left of --seconds {seconds:g}"
            else:
                _say(f"{part.name}: at most {allowed:.0f} s")
                assert output
                _run_part(worker, part, allowed, entry, partial(gpu_report.write, report, output))
                if entry["status"] not in AS_SAID:
                    worker.kill()
                    worker = None
                _say(f"{part.name}: {entry['status']}" + (f": {entry['reason']}" if entry.get("reason") else ""))
            report["seconds"] = seconds - (end - time.monotonic())
            if output:
                gpu_report.write(report, output)
    finally:
        if worker is not None:
            worker.kill()
    return report | {"output": str(output) if output else None}


def _run_part(worker: Worker, part: Part, seconds: float, entry: dict[str, Any], save: Callable[[], None]) -> None:
    """Fill in the part's entry, whatever becomes of it."""
    start = time.monotonic()
    try:
        worker.ask(place=part.place, seconds=seconds)
        while True:
            message = worker.hear(start + seconds - time.monotonic())
            for kind in ("figures", "checks"):
                entry[kind] |= message.get(kind, {})
            if "status" in message:
                entry |= {key: message[key] for key in ("status", "reason")}
                break
            save()
    except TimeoutError:
        entry |= {"status": "out of time", "reason": f"more than its {seconds:.0f} s"}
    except (EOFError, OSError) as error:
        entry |= {"status": "broken", "reason": str(error)}
    entry["seconds"] = time.monotonic() - start


def passed(report: dict[str, Any]) -> bool:
    """Whether every check was done and is right, or cannot be done on this device."""
    return all(entry["status"] in ("ok", "skipped") for entry in report["parts"].values() if entry.get("check"))


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        args = _parser().parse_args(arguments)
        parts = [part for part in PARTS if not args.parts or part.name in args.parts]
        if unknown := set(args.parts or ()) - {part.name for part in PARTS}:
            known = ", ".join(part.name for part in PARTS)
            raise BadArguments(f"--parts: there is no {min(unknown)!r}; known: {known}")
        if args.seconds <= 0:
            raise BadArguments(f"--seconds: must be above 0, got {args.seconds:g}")
        if args.output and (args.output.suffix != ".json" or not args.output.absolute().parent.is_dir()):
            raise BadArguments(f"--output: {args.output} must be a .json file in a folder that exists")
        report = run(parts, args.device, args.tiny, args.seconds, args.output)
    except BadArguments as error:
        print(f"benchmarks.gpu: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(gpu_report.markdown(report))
    print(f"written: {report['output']} and .md" if report["output"] else "nothing written: no process started")
    return 0 if passed(report) else 1


def _place(report: dict[str, Any]) -> Path:
    hardware = report["hardware"]
    name = re.sub(r"[^a-z0-9]+", "-", (hardware["gpu"] or "cpu").lower()).strip("-")
    return RESULTS / f"{report['date'][:10]}-gpu-{name}{'-tiny' * report['tiny']}.json"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of all parts together (default: {SECONDS:g})")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="networks of a few thousand numbers: to try the script")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--output", type=Path, help="JSON file; the table is beside it (default: benchmarks/results)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
