"""Judges behind HTTP, on ports of their own."""

from contextlib import closing

import pytest
import tenacity
from judge import Judge

from rewards import remote, tokens


@pytest.fixture
def quick(monkeypatch):
    """Pauses of thousandths of a second; no token of the developer's."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(remote, "MOST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "HEALTH_SECONDS", 60.0)
    monkeypatch.delenv(tokens.VARIABLE, raising=False)


@pytest.fixture
def once(quick, monkeypatch):
    """The first pause would go beyond any deadline, so that a request is tried once."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 1e6)
    monkeypatch.setattr(remote, "MOST_PAUSE", 1e6)
    monkeypatch.setattr(tenacity.wait.random, "uniform", lambda low, high: high)


@pytest.fixture
def judge():
    with closing(Judge()) as one:
        yield one


@pytest.fixture
def other():
    with closing(Judge()) as one:
        yield one
