"""The shape of the house: small files, no import circle, and front doors that start fast."""

import subprocess
import sys
from pathlib import Path

import grimp
import networkx
import pytest

from learner.__main__ import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 400
HEAVY = ("torch", "diffusers", "transformers", "ray", "mlflow")


def test_no_file_is_long():
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    ).stdout.split()
    long = {name: count for name in files if (count := len((ROOT / name).read_text().splitlines())) > MOST_LINES}
    assert files and not long


def test_no_two_modules_import_each_other():
    graph = grimp.build_graph("learner", *PACKAGES, cache_dir=None)
    arrows = [(module, other) for module in graph.modules for other in graph.find_modules_directly_imported_by(module)]
    assert len(arrows) > 300
    circles = [circle for circle in networkx.strongly_connected_components(networkx.DiGraph(arrows)) if len(circle) > 1]
    assert circles == []


@pytest.mark.parametrize("arguments", [["--help"], ["--print-config"], ["run.sed=1"], ["--no-such-option"]])
def test_the_front_door_is_light(arguments):
    code = (
        "import atexit, sys; import learner.run as run\n"
        f"atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules]))\n"
        f"run.main({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
