"""`kill -9` of the driver at every point of its protocol, then the same command: as if nothing had been."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray_processes
from driver import POINTS
from emulated_run import SETTINGS, outcome
from injected import WITNESS

from learner.config import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.ray, pytest.mark.long]

ORDINARY = ("checkpoint aside",)
# One rank, and old checkpoints pruned: the protocol is the same.
RUN = [*SETTINGS, "learner.ranks=1", "run.keep_checkpoints=1"]


def drive(folder, run, *options) -> tuple[subprocess.CompletedProcess, str]:
    """One driver, with a Ray of its own, which is under the temporary folder that is returned too."""
    temporary = tempfile.mkdtemp(prefix="tr-", dir="/tmp")
    here = Path(__file__).parent
    process = subprocess.run(
        [sys.executable, here / "driver.py", "--folder", folder, *options, "--", *RUN, f"run.dir={run}"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
        env={**os.environ, "RAY_TMPDIR": temporary, "PYTHONPATH": os.pathsep.join([str(ROOT), str(here)])},
    )  # fmt: skip
    print(process.stdout)
    return process, temporary


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    process, _ = drive(folder, folder / "run", "run.runner=inprocess")
    assert process.returncode == 0
    return outcome(folder / "run")


@pytest.mark.parametrize(
    "point", [pytest.param(name, marks=[] if name in ORDINARY else [pytest.mark.slow]) for name in POINTS]
)
def test_the_same_command_goes_on_bitwise(point, unbroken, tmp_path):
    killed, temporary = drive(tmp_path, tmp_path / "run", "--point", point)
    assert killed.returncode == -signal.SIGKILL and (tmp_path / WITNESS).exists()
    resumed, _ = drive(tmp_path, tmp_path / "run")
    assert resumed.returncode == 0 and "Traceback" not in resumed.stdout
    assert outcome(tmp_path / "run") == unbroken
    assert [path for path in (tmp_path / "run").rglob(".*") if path.name.startswith(".")] == []
    assert ray_processes.all_gone(temporary, 60)  # Ray's own doing: its agents look for their parent now and then
