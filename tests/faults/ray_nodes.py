"""Several raylets on this machine, as a cluster of several nodes."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ray.cluster_utils import Cluster

from cluster.auth import ensure_token


@contextlib.contextmanager
def cluster_of(head: dict[str, Any], *others: dict[str, Any]) -> Iterator[Cluster]:
    """A cluster of these nodes, in a folder of its own.

    `Cluster` makes neither a token nor the folder where it notes its address: both would be those that an earlier
    session has left on the machine, if one has.
    """
    ensure_token()
    folder = Path(tempfile.mkdtemp(prefix="tr-", dir="/tmp"))  # short: sockets' paths are limited
    (folder / "ray").mkdir()
    with patch.dict(os.environ, RAY_TMPDIR=str(folder)):
        cluster = Cluster(initialize_head=True, head_node_args={**head, "temp_dir": str(folder)})
        try:
            for node in others:
                cluster.add_node(**node)
            yield cluster
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
