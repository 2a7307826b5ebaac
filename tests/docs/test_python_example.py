"""docs/api.md's training example as a reader runs it: a script in a folder of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_training_example_runs(tmp_path):
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (example,) = (block for block in blocks if "learner.train(" in block)
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # the example is run from a clone
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    reward, lora = done.stdout.splitlines()[-2:]
    assert -1 <= float(reward) <= 1
    assert (tmp_path / lora / "pytorch_lora_weights.safetensors").is_file()
    assert len((tmp_path / "runs/red_from_python/metrics.jsonl").read_text().splitlines()) == 3
