"""Wait until the Ray cluster at RAY_ADDRESS has its nodes: python wait_for_nodes.py COUNT SECONDS.

slurm.sh and skypilot.yaml call it. Exit status 0 when COUNT nodes are alive, else 1 with one line after SECONDS.
"""

import contextlib
import os
import subprocess
import sys
import time

import ray

PROBE_SECONDS = 20.0


def answers(address: str) -> bool:
    """Whether a head answers there and takes our token. (`ray.init` would wait for minutes.)"""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    with contextlib.suppress(subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, timeout=PROBE_SECONDS).returncode == 0
    return False


def main(count: int, seconds: float) -> str | None:
    """The one line that says what is missing, if anything is."""
    address, deadline = os.environ["RAY_ADDRESS"], time.monotonic() + seconds
    while not answers(address):
        if time.monotonic() > deadline:
            return f"no Ray head that takes our token answers at {address} within {seconds:g} s"
        time.sleep(1)
    ray.init(address, log_to_driver=False, logging_level="WARNING")
    while (up := sum(node["Alive"] for node in ray.nodes())) < count:
        if time.monotonic() > deadline:
            return f"{up} of {count} nodes joined {address} within {seconds:g} s"
        time.sleep(0.5)
    return None


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
