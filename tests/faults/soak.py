"""A run that is broken again and again, at random, and ends as if it had not been: `make soak`.

    python tests/faults/soak.py [--seed N] [--epochs N] [--faults N]

Two nodes, of which one comes and goes; samplers, reward actors and learner ranks killed or stopped; the driver killed
and started again. Prints a line a fault, and a summary; exit status 1 if the end differs from the unbroken run's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

os.environ |= {"RAY_AUTH_MODE": "token", "OMP_NUM_THREADS": "1"}  # read when Ray is imported

import psutil
from emulated_run import SETTINGS, outcome, totals
from ray.cluster_utils import Cluster
from ray_nodes import cluster_of

from learner.config import ROOT

HERE = Path(__file__).parent
TITLES = {"sampler": "ray::SamplerActor", "scorer": "ray::RewardActor", "rank": "ray::LearnerActor"}
# What may happen, and how often of all.
WEIGHTS = {
    ("kill", "sampler"): 40, ("kill", "scorer"): 22, ("kill", "rank"): 16, ("kill", "driver"): 6, ("kill", "node"): 4,
    ("stop", "sampler"): 6, ("stop", "scorer"): 4, ("stop", "rank"): 2,
}  # fmt: skip
SECONDS = ("0.2", "0.05", "0.4")  # of a chunk's sampling and scoring, and of an epoch's training
DEADLINES = ("run.chunk_seconds=4", "run.train_seconds=6", "run.ready_seconds=120")
FIND_SECONDS = 30.0


class Driver:
    """The run's command, given again whenever it was killed."""

    def __init__(self, folder: Path, settings: list[str], seconds: Sequence[str] = ("0", "0", "0")) -> None:
        self.command = [sys.executable, str(HERE / "driver.py"), "--seconds", *seconds, "--", *settings]
        self.command += [f"run.dir={folder}"]
        self.heard: list[str] = []
        self.typed_ends = 0
        self.start()

    def start(self) -> None:
        self._before = len(self.heard)
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.heard.append(line.rstrip())

    def epochs(self) -> int:
        """How many are done."""
        done = [text for text in self.heard if text.startswith("epoch ")]
        return int(done[-1].split()[1].split("/")[0]) if done else 0

    def at_work(self) -> bool:
        """Whether all its actors are up."""
        return any("epochs of" in text for text in self.heard[self._before :])

    def over(self) -> bool:
        """Whether the run is. One that ended in a typed error goes on by the same command."""
        if self.process.poll() == 1 and any("the same command goes on" in text for text in self.heard[-3:]):
            self.typed_ends += 1
            print(f"ended: {self.heard[-1]}", flush=True)
            self.start()
        return self.process.poll() is not None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self.start()


class Soak:
    def __init__(self, rng: random.Random, cluster: Cluster, driver: Driver) -> None:
        self.rng, self.cluster, self.driver = rng, cluster, driver
        self.node = cluster.add_node(num_cpus=2)
        self.faults: list[str] = []

    def strike(self) -> None:
        (kind, role) = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        if role == "driver":
            self.driver.kill()
        elif role == "node":
            self.cluster.remove_node(self.node, allow_graceful=False)
            self.node = self.cluster.add_node(num_cpus=2)
        elif not self._signal(role, signal.SIGKILL if kind == "kill" else signal.SIGSTOP):
            return
        self.faults.append(f"{kind} {role}")
        print(f"fault {len(self.faults)}: {kind} {role} after {self.driver.epochs()} epochs", flush=True)

    def _signal(self, role: str, number: int) -> bool:
        """Send it to a process of the role, of this run's; False if there is none for long."""
        deadline = time.monotonic() + FIND_SECONDS
        while time.monotonic() < deadline and self.driver.process.poll() is None:
            if found := processes(TITLES[role]):
                with suppress(psutil.Error):
                    self.rng.choice(found).send_signal(number)
                    return True
            time.sleep(0.1)
        return False


def processes(title: str) -> list[psutil.Process]:
    """Of the nodes that this process started, those with such a title, in a stable order."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, IndexError):
            stopped = process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
            if process.cmdline()[0].startswith(title) and not stopped:
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--faults", type=int, default=60, help="about so many")
    parser.add_argument("--minutes", type=float, default=20, help="give up after so long")
    args = parser.parse_args()
    begun, rng = time.monotonic(), random.Random(args.seed)
    place = Path(tempfile.mkdtemp(prefix="tr-", dir="/tmp"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(HERE)])
    settings = [*SETTINGS, f"train.epochs={args.epochs}", "evaluation.every=8", "sampler.actors=3", "reward.actors=2"]
    settings += [*DEADLINES, "run.chunk_attempts=1000", "learner.attempts=1000"]
    unbroken = Driver(place / "unbroken", [*settings, "run.runner=inprocess"])
    if unbroken.process.wait(args.minutes * 60):
        print(unbroken.heard)
        return 1
    print(f"unbroken: {time.monotonic() - begun:.0f} s", flush=True)
    several = contextlib.ExitStack()
    cluster = several.enter_context(cluster_of({"num_cpus": 2}))
    os.environ["RAY_ADDRESS"] = cluster.address
    soak = Soak(rng, cluster, Driver(place / "run", settings, SECONDS))
    driver, each = soak.driver, args.faults / args.epochs
    try:
        while not driver.over():
            if time.monotonic() - begun > args.minutes * 60:
                print(f"not done after {args.minutes:g} minutes")
                driver.process.kill()
                break
            due = min(args.faults, each * (driver.epochs() + 1))
            if len(soak.faults) < due and driver.at_work():
                time.sleep(rng.uniform(0.0, 1.5))
                soak.strike()
            time.sleep(0.05)
        status = driver.process.wait(10)
    finally:
        if driver.process.poll() is None:
            driver.process.kill()
        several.close()
    counts = ", ".join(f"{count} x {name}" for name, count in Counter(soak.faults).most_common())
    print(f"{len(soak.faults)} faults: {counts}")
    print(f"ended in a typed error and was started again: {driver.typed_ends} times")
    if status:
        print("\n".join(driver.heard[-20:]))
        print(f"exit status {status}; files in {place}")
        return 1
    expected, got = outcome(place / "unbroken"), outcome(place / "run")
    different = [name for name in expected if expected[name] != got[name]]
    lost = totals(place / "run")["lost"]
    print(f"{args.epochs} epochs in {time.monotonic() - begun:.0f} s; {lost} trajectories made again")
    print(f"different: {', '.join(different)}; files in {place}" if different else "bitwise the unbroken run's")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
