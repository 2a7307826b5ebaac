"""The versioned weight store: one object a policy version, put once by the driver, read by every sampler."""

from __future__ import annotations

import ray

from cluster.waits import put
from diffusion.snapshot import Snapshot


class WeightStore:
    """Holds the reference of the newest version; older ones are freed once no call uses them."""

    def __init__(self) -> None:
        self.version = -1
        self.ref: ray.ObjectRef | None = None

    def publish(self, snapshot: Snapshot) -> None:
        """Put a version. The driver owns the object, so it outlives whichever actor made it.

        Raises:
            ValueError: the version is not newer than the last.
            ObjectLost: the object store has no room for it.
        """
        if snapshot.version <= self.version:
            raise ValueError(f"policy version {snapshot.version} published after {self.version}")
        self.ref, self.version = put(snapshot, f"publishing policy version {snapshot.version}"), snapshot.version
