"""Help and argument errors come at once: no command imports a heavy library before its arguments are sound."""

import json
import subprocess
import sys

import pytest

from learner.__main__ import VERBS
from learner.config import ROOT

# Every command line in one process, in turns: [exit status, stderr, heavy libraries imported so far] of each.
CODE = """
import contextlib, io, json, runpy, sys
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["tributary", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_module("learner", run_name="__main__")
        except SystemExit as end:
            status = end.code
    heavy = {"torch", "diffusers", "transformers", "ray", "mlflow", "huggingface_hub"} & {*sys.modules}
    print(json.dumps([status, said.getvalue(), sorted(heavy)]))
"""
SEMANTIC = [  # arguments that no parser refuses
    ("run", "train.epochs=-1"), ("status", "NONE"), ("upload", "NONE"), ("evaluate", "NONE"),
    ("evaluate", "run.seed=1"), ("compare", "NONE"),
    ("targets", "NONE"), ("generate", "--lora", "NONE"), ("generate", "--images", "0"),
    ("generate", "--steps", "1"), ("generate", "--out", "grid.jpg"), ("export", "NONE", "--format", "fused"),
    ("export", "RUN", "--format", "fused", "--step", "7"), ("score", "--reward", "beauty", "."),
    ("score", "--reward", "hpsv2", "nowhere.png"), ("verify", "beauty"), ("settled", "NONE"),
]  # fmt: skip
SETTINGS = [(verb, "RUN", "evaluation.imges=3", "sampler.steps=none") for verb in ("evaluate", "compare", "targets")]
PARSED = [(verb, option) for verb in VERBS for option in ("--help", "--no-such-option")]
LINES = [*PARSED, *SEMANTIC, *SETTINGS, ("status", "RUN"), ("run", "--print-config")]


@pytest.fixture(scope="module")
def outcomes(finished_run, tmp_path_factory):
    places = {"NONE": str(tmp_path_factory.mktemp("none") / "none"), "RUN": str(finished_run)}
    lines = json.dumps([[places.get(word, word) for word in line] for line in LINES])
    done = subprocess.run([sys.executable, "-c", CODE, lines], cwd=ROOT, capture_output=True, text=True, timeout=200)
    return dict(zip(LINES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_nothing_heavy_is_imported_and_what_is_wrong_is_said(line, outcomes):
    status, said, heavy = outcomes[line]
    assert heavy == []
    if line in SETTINGS:
        assert status == 2 and "did you mean evaluation.images?" in said and "sampler.steps" in said
    elif line in SEMANTIC:
        assert status == 2 and said.startswith(f"learner.{line[0]}: ") and said.count("\n") == 1
    elif line[1] == "--no-such-option":
        assert status == 2 and "usage: " in said
    else:
        assert (status, said) == (0, "")
