"""Wait until the Ray cluster at RAY_ADDRESS has its nodes: python -m cluster.deploy.wait_for_nodes COUNT SECONDS.
slurm.sh and skypilot.yaml call it. Exit status 0 when COUNT nodes are alive, else 1 with one line after SECONDS."""

import os
import sys
import time

from cluster.nodes import alive_nodes
from cluster.session import ClusterUnreachable, Session
from diffusion.failures import DeadlineExceeded


def main(count: int, seconds: float) -> str | None:
    """The one line that says what is missing, if anything is."""
    address, deadline = os.environ["RAY_ADDRESS"], time.monotonic() + seconds
    while True:
        try:
            Session(1)  # once it is connected, another one does nothing
            if (up := len(alive_nodes())) >= count:
                return None
            missing = f"{up} of {count} nodes joined {address}"
        except (ClusterUnreachable, DeadlineExceeded) as error:
            missing = str(error)
        if time.monotonic() > deadline:
            return f"{missing} (waited {seconds:g} s)"
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2])))
