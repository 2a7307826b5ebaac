"""Help and argument errors come at once: no command imports a heavy library before its arguments are sound."""

import subprocess
import sys

import pytest

from learner.__main__ import VERBS
from learner.config import ROOT

HEAVY = ("torch", "diffusers", "transformers", "ray", "mlflow")
CODE = """
import atexit, runpy, sys
atexit.register(lambda: print([name for name in {heavy} if name in sys.modules]))
sys.argv[0] = "tributary"
runpy.run_module("learner", run_name="__main__")
"""
NONE = "{}/none"
SEMANTIC = [  # arguments that no parser refuses
    ("run", "train.epochs=-1"), ("status", NONE), ("evaluate", NONE), ("evaluate", "run.seed=1"), ("compare", NONE),
    ("generate", "--lora", NONE), ("generate", "--images", "0"), ("generate", "--steps", "1"),
    ("generate", "--out", f"{NONE}/grid.png"),
]  # fmt: skip


def light(*arguments: str) -> tuple[int, str]:
    """Exit status and stderr."""
    command = [sys.executable, "-c", CODE.format(heavy=HEAVY), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_unknown_options(verb):
    assert light(verb, "--help")[0] == 0
    status, said = light(verb, "--no-such-option")
    assert status == 2 and "usage: " in said


@pytest.mark.parametrize("arguments", SEMANTIC, ids=" ".join)
def test_wrong_arguments(arguments, tmp_path):
    status, said = light(*(word.format(tmp_path) for word in arguments))
    assert status == 2 and said.startswith(f"learner.{arguments[0]}: ") and said.count("\n") == 1


@pytest.mark.parametrize("verb", ["evaluate", "compare"])
def test_settings_that_a_run_has_not(verb, finished_run):
    status, said = light(verb, str(finished_run), "evaluation.imges=3", "sampler.steps=none")
    assert status == 2 and "did you mean evaluation.images?" in said and "sampler.steps" in said


def test_a_whole_look_at_a_run(finished_run):
    assert light("status", str(finished_run)) == (0, "")
