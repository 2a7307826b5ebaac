"""What a judge behind HTTP costs a run, against the same reward in process; compute is emulated.

    python -m benchmarks.remote [--latency 0.1] [--in-flight 16] [--batch 4] [--rounds 5] [--output F.json]

The judge is a process of its own. It scores on one emulated device, one image after the other, and every request takes
--latency seconds more, however many there are at a time. In process the reward takes the same seconds an image on one
device. Both serve the same runner, epoch by epoch in turns: in process, and on Ray with two samplers and one reward
actor. Both must give the same adapters. docs/performance.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from actors.ray_runner import RayRunner
from benchmarks import emulated
from benchmarks.emulated import Emulation
from benchmarks.protocol import epochs, settings
from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, CleanPredictions, Scores, Trajectories
from learner import build
from learner.inprocess import InProcessRunner
from learner.protocol.runner import Hooks
from records import environment
from rewards.remote import PROTOCOL, Remote
from rewards.scorer import Scorer

PIXELS, CHUNK, CHUNKS = 64, 16, 8
RUNNERS = {"in process": InProcessRunner, "on Ray": RayRunner}
# Seconds of sampling a chunk, and of the judge's work an image: it is the samplers' time that counts, or the judge's.
CASES = ((1.0, 0.02), (1.0, 0.06), (0.3, 0.02))
TRAIN_SECONDS, START_SECONDS = 0.5, 60.0


class InProcess:
    """The judge's reward, on a device of this process."""

    name, differentiable, image_only = "emulated", False, True

    def __init__(self, seconds: float) -> None:
        self.seconds, self.device = seconds, threading.Lock()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        return torch.tensor(self.scores(pixels), dtype=torch.float32)

    def scores(self, pixels: np.ndarray) -> list[float]:
        with self.device:
            time.sleep(self.seconds * len(pixels))
        return [float(picture.mean()) / 255 for picture in pixels]


class Turns:
    """Scores even epochs in process, odd ones by the judge."""

    def __init__(self, seconds: float, options: dict[str, Any]) -> None:
        self.scorers = [Scorer(decode, InProcess(seconds)), Scorer(decode, Remote(**options))]
        self.batch = CHUNK

    def fitting_batch(self, *_: Any) -> int:
        return self.batch

    def score(self, clean: CleanPredictions) -> Scores:
        return self.scorers[clean.chunk.epoch % 2].score(clean)

    def rest(self) -> None: ...


class ImagesAlone(emulated.EmulatedSampler):
    """Hands on finished pictures, and no inner states."""

    def sample(self, chunk: Chunk, snapshot: Snapshot) -> tuple[Trajectories, CleanPredictions]:
        made, clean = super().sample(chunk, snapshot)
        at = clean.step == clean.num_steps
        return made, replace(clean, latents=clean.latents[at], row=clean.row[at], step=clean.step[at])


def decode(latents: Tensor) -> Tensor:
    """Pictures of one shade, none of them black."""
    return latents[:, :1, :1, :1].add(1).div(2).expand(-1, 3, PIXELS, PIXELS)


class Handler(BaseHTTPRequestHandler):
    """The judge's; the device and the latency are class attributes."""

    protocol_version, reward, latency = "HTTP/1.1", InProcess(0.0), 0.0

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        pixels = np.frombuffer(base64.b64decode(body["pixels"]), np.uint8).reshape(body["shape"])
        time.sleep(self.latency)
        content = json.dumps({"scores": self.reward.scores(pixels)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def judge(seconds: float, latency: float) -> Iterator[str]:
    """Its URL."""
    command = [sys.executable, "-m", "benchmarks.remote", "--judge", str(seconds), "--latency", str(latency)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait(START_SECONDS)


def serve(seconds: float, latency: float) -> None:
    Handler.reward, Handler.latency = InProcess(seconds), latency
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


def compare(sample: float, seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of whole epochs with the reward in process and behind HTTP, by runner; the first pair is not counted."""
    work = Emulation(sample_seconds=sample, train_seconds=TRAIN_SECONDS)
    found: dict[str, Any] = {"sample_seconds_a_chunk": sample, "judge_seconds_an_image": seconds}
    with judge(seconds, args.latency) as url:
        options = {"urls": url, "format": "raw", "batch": args.batch, "in_flight": args.in_flight}
        overrides = ["reward.name=remote", f"reward.options={json.dumps(options)}", "sampler.actors=2"]
        config = settings(CHUNKS * CHUNK, f"sampler.chunk_size={CHUNK}", *overrides)
        parts = replace(
            emulated.parts(work), sampler=partial(ImagesAlone, work), scorer=partial(Turns, seconds, options)
        )
        for name, kind in RUNNERS.items():
            with patch.object(build, "parts", lambda *_: parts):
                runner = kind(config, None, Hooks())
            try:
                times = list(epochs(runner, config, 2 * args.rounds + 2))[2:]
            finally:
                runner.close()
            plain, remote = times[::2], times[1::2]
            ratios = [there / here for here, there in zip(plain, remote, strict=True)]
            found[name] = {"in_process": plain, "remote": remote, "ratios": ratios, "ratio": median(ratios)}
            print(
                f"sampling {sample:g} s a chunk, judge {seconds:g} s an image, {name}: {median(plain):.2f} s an epoch, "
                f"behind HTTP {median(remote):.2f} s, ratio {median(ratios):.3f} ({min(ratios):.3f} to "
                f"{max(ratios):.3f})",
                flush=True,
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.remote", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--latency", type=float, default=0.1, help="seconds of every request beside the judge's work")
    parser.add_argument("--in-flight", type=int, default=16, help="requests at once (default %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="images a request (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of epochs that count (default %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--judge", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.judge is not None:
        serve(args.judge, args.latency)
    shown = {"latency": args.latency, "in_flight": args.in_flight, "batch": args.batch, "protocol": PROTOCOL}
    report = {"date": time.strftime("%Y-%m-%d"), "environment": environment.facts(), **shown, "cases": []}
    for sample, seconds in CASES:
        report["cases"].append(compare(sample, seconds, args))
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
