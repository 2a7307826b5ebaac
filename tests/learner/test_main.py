"""One entry: `python -m learner` and `tributary` list and run all verbs; modules that hide ours are named."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import learner
from learner import PACKAGES
from learner.__main__ import VERBS

ROOT = Path(__file__).resolve().parents[2]


def call(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_all_verbs_and_packages_are_listed_and_other_verbs_refused():
    listed = call("-m", "learner")
    assert listed.returncode == 0 and all(f"\n  {verb} " in listed.stdout for verb in VERBS)
    wrong = call("-m", "learner", "trian")
    assert wrong.returncode == 2 and wrong.stderr.startswith("learner: there is no command 'trian'\n")
    by_its_own_name = call("-m", "learner.status", "no/run")  # the other way: tests/commands/test_light.py
    assert by_its_own_name.returncode == 2 and by_its_own_name.stderr.startswith("learner.status: ")
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"learner", "benchmarks"}
    assert folders == set(PACKAGES)  # every one is guarded


def test_from_python_a_module_that_hides_ours_is_named_too(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"rewards\.py hides Tributary's own package 'rewards': rename it"):
        learner.__getattr__("train")


def test_the_console_script_finds_the_current_directory(tmp_path):
    (tmp_path / "models.py").touch()
    done = call("-c", "import sys; sys.argv = ['tributary', 'run', '--help'];"
                "from learner.__main__ import main; main()", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2 and "models.py hides Tributary's own package 'models'" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("run", "--print-config")], ids=" ".join)
def test_where_nobody_reads_on_a_command_ends_without_a_word(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "learner", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("command", ["learner.run", "learner.status"])
def test_a_users_module_that_hides_ours_is_named_with_the_remedy(command, tmp_path):
    (tmp_path / "rewards.py").write_text("def score(images, prompts): ...\n")
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/__init__.py").touch()
    done = call("-m", command, "--help", cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout and len(lines) == 2
    assert f"{tmp_path / 'cluster'} hides Tributary's own package 'cluster': rename it" in lines[0]
    assert f"{tmp_path / 'rewards.py'} hides Tributary's own package 'rewards': rename it" in lines[1]
