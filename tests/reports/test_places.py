"""Where a server may say that artifacts go."""

import contextlib

import pytest

from reports.mlflow_mirror import StrangePlace, require_own_place


@pytest.mark.parametrize(
    ("server", "place", "own"),
    [
        ("https://me:pw@host:1", "mlflow-artifacts:/1/a", True),
        ("https://host:1", "mlflow-artifacts://host:1/1/a", True),
        ("https://host:1", "mlflow-artifacts://elsewhere:1/1/a", False),
        ("https://host:1", "http://elsewhere/a", False),
        ("https://host:1", "s3://bucket/a", True),
        ("https://host:1", "file:///home/me/.ssh", False),
        ("https://host:1", "/home/me/.ssh", False),
        ("http://127.0.0.1:1", "/srv/kept/1", True),
        ("postgresql://host/x", "/srv/kept/1", True),
        ("postgresql://host/x", "http://elsewhere/a", False),
        ("sqlite:////srv/mlflow.db", "file:///srv/mlartifacts/1", True),
        ("sqlite:////srv/mlflow.db", "/srv/../home/me", False),
        ("sqlite:////srv/mlflow.db", "s3://bucket/a", False),
    ],
)
def test_places_of_artifacts(server, place, own):
    with contextlib.nullcontext() if own else pytest.raises(StrangePlace, match="not its own"):
        require_own_place(server, place)
