"""docs/tutorial.md as a reader does it: every block of it in order, in a copy of the clone, start to finish."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs/tutorial.md"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.M | re.S)  # installing is a ```bash block: not run here
FILE = re.compile(r"`([\w/]+\.py)`:$")  # ends the line before a file's block
LEFT_OUT = (".git", ".venv", "runs", "build", "*.egg-info", ".*_cache", "__pycache__")


def steps(text: str) -> list[tuple[str | None, str]]:
    """In order: (file, its content) and (None, shell commands)."""
    found: list[tuple[str | None, str]] = []
    for block in BLOCK.finditer(text):
        kind, body = block.groups()
        name = FILE.search(text[: block.start()].rstrip())
        assert name or kind == "sh", f"no file name before: {body}"
        found.append((name[1] if kind == "python" else None, body))
    return found


def surroundings(folder: Path) -> dict[str, str]:
    """A reader's: this environment's Python first, the copy's own code, a Ray and a cache of their own."""
    dropped = ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "TRIBUTARY_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(folder), "HOME": str(folder / "home")}


def walk_through(folder: Path, found: list[tuple[str | None, str]], deadline: float) -> str:
    """Do them in `folder`; what they printed, commands and seconds included."""
    said = ""
    for name, body in found:
        if name:
            (folder / name).write_text(body)
            continue
        start = time.monotonic()
        done = subprocess.run(
            ["bash", "-e", "-c", body], cwd=folder, env=surroundings(folder), text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=max(1.0, deadline - time.monotonic()),
        )  # fmt: skip
        said += f"$ {body}{done.stdout}[{time.monotonic() - start:.0f} s]\n"
        assert done.returncode == 0, said
    return said


def mean_ink(file: Path) -> float:
    picture = np.asarray(Image.open(file).convert("RGB"), np.float32) / 255
    return float((np.linalg.norm(picture - picture[0, 0], axis=2) > 0.4).mean())


def test_every_command_of_it_is_complete():
    found = steps(TUTORIAL.read_text())
    assert [name for name, _ in found if name] == ["my_reward.py", "draw.py"]
    commands = [line for name, body in found if not name for line in body.splitlines()]
    assert len(commands) >= 9 and not any(re.search(r"<\w+>|\.\.\.|NAME|OTHER", line) for line in commands)
    assert all("run.dir=runs/" in line for line in commands if "learner.run" in line)


@pytest.mark.slow
@pytest.mark.timeout(40 * 60)
def test_the_whole_of_it(tmp_path):
    folder = tmp_path / "clone"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    before = {path.name for path in folder.iterdir()}
    start = time.monotonic()
    said = walk_through(folder, steps(TUTORIAL.read_text()), start + 35 * 60)
    minutes = (time.monotonic() - start) / 60
    print(said, f"the whole: {minutes:.1f} minutes", sep="\n")

    runs = folder / "runs"
    for name in (
        "base.png", "bigger.png", "bigger/report.html", "bigger/before.png", "bigger/after.png", "comparison/sheet.png",
        "comparison/pareto.png", "comparison/comparison.md", "drawn-3.png",
        "bigger/export/fused/README.md", "mlflow.db",
    ):  # fmt: skip
        assert (runs / name).stat().st_size > 0
    new = {path.name for path in folder.iterdir()} - before
    assert new <= {"my_reward.py", "draw.py", "runs", "home", "__pycache__"}

    (judged,) = (runs / "bigger/evaluation").glob("step-000016-96-images-*.json")
    figures = json.loads(judged.read_text())
    assert figures["reward"]["gain_low"] > 0 and figures["reward"]["gain"] > 3 * figures["reward"]["floor_high"]
    assert figures["reward"]["value"] > 1.3 * figures["reward"]["base"]  # what one sees
    assert figures["accuracy"]["value"] > 0.85
    ends = re.findall(r"^evaluated reward .*$", said, re.M)
    assert len(ends) == 2 and all(end.endswith("it rose by more than chance") for end in ends)
    first, second = re.split(r"run\.dir=runs/too_much", said)
    assert "no sign of collapse in 2 evaluations" in first
    assert "COLLAPSE? " in second and "SIGNS OF COLLAPSE after epoch 6" in second
    compared = json.loads((runs / "comparison/comparison.json").read_text())["adapters"]
    mild, harsh = (next(run for run in compared if run["name"] == name) for name in ("bigger", "too_much"))
    assert harsh["reward"]["value"] > mild["reward"]["value"]
    assert harsh["accuracy"]["value"] < mild["accuracy"]["value"] - 0.2
    drawn = np.mean([mean_ink(runs / f"drawn-{i}.png") for i in range(4)])
    assert drawn > 1.2 * np.mean([mean_ink(file) for file in (runs / "base").glob("prompt-01-*-base.png")])
