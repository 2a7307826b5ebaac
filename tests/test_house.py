"""The shape of the house: small files, no import circle, mutations that still are some. (Light front doors:
tests/commands/test_light.py.)"""

import subprocess
from pathlib import Path

import grimp
import networkx
from mutations import MUTATIONS

from learner import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
MOST_LINES = 400


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


def test_every_mutation_has_its_place_and_its_tests():
    gone = [(name, old) for name, old, _, _ in MUTATIONS if (ROOT / name).read_text(encoding="utf-8").count(old) != 1]
    assert not gone and all((ROOT / tests.split()[0]).is_file() for *_, tests in MUTATIONS)
