"""Runs over emulated parts, for tests of what is around the learner."""

from contextlib import contextmanager

import pytest
from emulated_run import IN_PROCESS, SETTINGS, use_emulated_parts

from commands import plan
from learner.run import main
from reports import html


@contextmanager
def light_parts():
    """Settings of a run in a third of a second, over parts that compute next to nothing, while this is entered: no
    report is drawn, and a plan is only its place."""
    with pytest.MonkeyPatch.context() as patch:
        use_emulated_parts(patch)
        patch.setattr(html, "render", lambda records, config: b"drawn")
        patch.setattr(plan, "describe", lambda config, placement, resources, place, *more: place)
        yield [*SETTINGS, *IN_PROCESS]


@pytest.fixture
def light():
    with light_parts() as settings:
        yield settings


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Three epochs, over emulated parts. Whoever changes it takes a copy."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    with light_parts() as settings:
        assert main([*settings, f"run.dir={folder}"]) == 0
    return folder
