"""Building the packages' environments, with commands that only pretend (test_package_for_real.py builds them)."""

import sys
from pathlib import Path

import pytest

from commands import build_package
from commands.build_package import BPE, BuildFailed
from learner import ROOT
from rewards import package_environment, package_worker
from rewards.package_environment import EnvironmentMissing


class Pip:
    def __init__(self, fails: str = "none of them") -> None:
        self.commands, self.fails = [], fails

    def __call__(self, command):
        self.commands.append(" ".join(command))
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.symlink_to(sys.executable)
            vocabulary = python.parents[1] / "lib/python3.11/site-packages/open_clip" / BPE
            for file in (vocabulary, vocabulary.parents[1] / "hpsv2/src/open_clip/factory.py"):
                file.parent.mkdir(parents=True)
                file.write_text("words")
        if self.fails in self.commands[-1]:
            raise BuildFailed("no network")


def test_a_build_is_whole_or_not_there_and_done_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = package_environment.place("hpsv2")
    monkeypatch.setattr(build_package, "_run", Pip(fails="--requirement"))
    assert build_package.main(["build", "hpsv2"]) == 1
    assert "no network" in capsys.readouterr().err and not folder.exists()
    assert [path.name for path in folder.parent.iterdir()] == [".hpsv2.lock"]
    (folder.parent / ".hpsv2.building" / "half").mkdir(parents=True)  # of one that was killed
    monkeypatch.setattr(build_package, "_run", pip := Pip())
    assert build_package.main(["build", "hpsv2"]) == 0
    assert capsys.readouterr().out == "python -m rewards.serve hpsv2 --package\n"
    assert (folder / "lib/python3.11/site-packages/hpsv2/src/open_clip" / BPE).exists()
    assert package_environment.find("hpsv2") == folder / "bin" / "python"
    _venv, first, rest = pip.commands
    assert first.endswith("locks/hpsv2.txt torch setuptools wheel") and "--no-deps" not in first
    assert "--no-deps" in rest and rest.endswith("locks/hpsv2.txt")
    assert build_package.main(["build", "hpsv2"]) == 0 and len(pip.commands) == 3
    (folder / package_environment.MARKER).write_text("torch==1.0\n")
    with pytest.raises(EnvironmentMissing, match="of another Tributary"):
        package_environment.find("hpsv2")
    assert build_package.build("hpsv2") == package_environment.find("hpsv2") and len(pip.commands) == 6


def test_what_fails_is_shown_with_its_last_lines(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build_package.main(["build", "hpsv2"]) == 1
    assert "Not a directory" in capsys.readouterr().err
    with pytest.raises(BuildFailed, match=r"import sys.*exit status 1.\n  no such version"):
        build_package._run([sys.executable, "-c", "import sys; sys.exit('no such version')"])


@pytest.mark.parametrize("name", package_environment.NAMES)
def test_locks_pin_everything_and_what_builds_the_rest(name):
    lines = [line for line in package_environment.lock(name).read_text().splitlines() if line[:1] != "#"]
    assert not any(" " in line for line in lines) and name in package_worker.MODELS
    pinned = dict(line.split("==") for line in lines)
    assert len(pinned) == len(lines) and {"torch", "setuptools", "wheel"} <= set(pinned)
    ours = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    server = ("fastapi", "starlette", "uvicorn", "pydantic", "pydantic_core", "prometheus_client", "anyio", "h11")
    assert {part: pinned[part] for part in server} == {part: ours[part] for part in server}
