"""Wait until the Ray cluster at RAY_ADDRESS has its nodes: python -m cluster.deploy.wait_for_nodes COUNT SECONDS.
slurm.sh and skypilot.yaml call it. Exit status 0 when COUNT nodes are alive, else 1 with one line after SECONDS."""

import os
import sys
import time

import ray

from cluster.auth import ClusterUnreachable, require_answer


def main(count: int, seconds: float) -> str | None:
    """The one line that says what is missing, if anything is."""
    address, deadline = os.environ["RAY_ADDRESS"], time.monotonic() + seconds
    while not ray.is_initialized():
        try:
            require_answer(address)
            ray.init(address, log_to_driver=False, logging_level="WARNING")
        except ClusterUnreachable as error:
            if time.monotonic() > deadline:
                return f"{error} (waited {seconds:g} s)"
            time.sleep(1)
    while (up := sum(node["Alive"] for node in ray.nodes())) < count:
        if time.monotonic() > deadline:
            return f"{up} of {count} nodes joined {address} within {seconds:g} s"
        time.sleep(0.5)
    return None


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
