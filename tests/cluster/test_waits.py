"""Failures of Ray told apart: an object store without room, on a real one."""

import numpy as np
import pytest
import ray

from cluster import session
from cluster.waits import StoreFull, get, put

MEGABYTES = 80


@pytest.mark.ray
@pytest.mark.long
def test_a_full_store_on_a_full_disk_is_named_with_what_needs_less(monkeypatch):
    """Ray takes the disk for full from the first byte on, so nothing is spilled."""

    class Maker:  # in here, since Ray's workers do not find this file
        def make(self):
            return np.zeros(30 << 20, np.uint8)

    monkeypatch.setenv("RAY_local_fs_capacity_threshold", "0.0")
    start = session._init
    monkeypatch.setattr(session, "_init", lambda *a, **k: start(*a, **k, object_store_memory=MEGABYTES << 20))
    one = session.Session(1)
    try:
        actor = ray.remote(Maker).remote()
        kept = [actor.make.remote() for _ in range(2)]
        assert sum(array.nbytes for array in get(kept, 60, "two arrays", "a test")) == 60 << 20
        for attempt in (
            lambda: get(actor.make.remote(), 60, "sampling chunk 3", "a test"),
            lambda: put(np.zeros(30 << 20, np.uint8), "sampling chunk 3"),
        ):
            with pytest.raises(StoreFull, match=r"sampling chunk 3: the object store is full.*train\.trajectories"):
                attempt()
    finally:
        one.close()
