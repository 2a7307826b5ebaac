"""Building the packages' environments, with commands that only pretend; test_package_for_real.py builds them."""

import json
import sys
from pathlib import Path

import pytest

from rewards import package, package_environment, package_worker
from rewards.package_environment import BuildFailed, EnvironmentMissing


class Pip:
    """Stands for the commands of a build."""

    def __init__(self, fails: str = "none of them") -> None:
        self.commands, self.fails = [], fails

    def __call__(self, command):
        self.commands.append(" ".join(command))
        if "venv" in command:
            python = package_environment.interpreter(Path(command[-1]))
            python.parent.mkdir(parents=True)
            python.symlink_to(sys.executable)
            vocabulary = python.parents[1] / "lib/python3.11/site-packages/open_clip" / package_environment.BPE
            for file in (vocabulary, vocabulary.parents[1] / "hpsv2/src/open_clip/factory.py"):
                file.parent.mkdir(parents=True)
                file.write_text("words")
        if self.fails in self.commands[-1]:
            raise BuildFailed("no network")


def test_a_build_is_whole_or_not_there_and_done_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = package_environment.default_folder("hpsv2")
    monkeypatch.setattr(package_environment, "_run", Pip(fails="--requirement"))
    assert package.main(["build", "hpsv2"]) == 1
    assert "no network" in capsys.readouterr().err and not folder.exists()
    assert [path.name for path in folder.parent.iterdir()] == [".hpsv2.lock"]
    (folder.parent / ".hpsv2.building" / "half").mkdir(parents=True)  # of one that was killed
    monkeypatch.setattr(package_environment, "_run", pip := Pip())
    assert package.main(["build", "hpsv2"]) == 0
    assert capsys.readouterr().out.split() == ["reward.name=hpsv2", "reward.backend=package"]
    assert (folder / "lib/python3.11/site-packages/hpsv2/src/open_clip" / package_environment.BPE).exists()
    assert package_environment.find("hpsv2") == package_environment.interpreter(folder)
    _venv, first, builders, rest = pip.commands
    assert first.endswith("torch==2.13.0") and builders.endswith("setuptools==80.10.2")
    assert "--no-deps" in rest and rest.endswith("locks/hpsv2.txt")
    assert package.main(["build", "hpsv2"]) == 0 and len(pip.commands) == 4


def test_an_environment_of_another_lock_is_renewed_and_a_strange_folder_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(package_environment, "_run", pip := Pip())
    folder = package_environment.default_folder("imagereward")
    package_environment.build("imagereward")
    marker = folder / package_environment.MARKER
    marker.write_text(json.dumps({"package": "imagereward", "lock_sha256": "older"}))
    with pytest.raises(EnvironmentMissing, match="built for another Tributary"):
        package_environment.find("imagereward")
    package_environment.build("imagereward")
    assert package_environment.find("imagereward") and len(pip.commands) == 8
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert package.main(["build", "hpsv2", "--dir", str(tmp_path / "mine")]) == 1
    assert "something else" in capsys.readouterr().err and (tmp_path / "mine" / "thesis.tex").exists()
    (tmp_path / "file").write_text("")
    assert package.main(["build", "hpsv2", "--dir", str(tmp_path / "file" / "below")]) == 1
    assert package.main(["build", "hpsv2", "--dir", str(tmp_path / "new")]) == 0
    assert f"reward.options.python={tmp_path / 'new' / 'bin' / 'python'}" in capsys.readouterr().out


def test_a_failing_command_is_shown_with_its_last_lines():
    with pytest.raises(BuildFailed, match=r"import sys.*failed:\n  no such version"):
        package_environment._run([sys.executable, "-c", "import sys; sys.exit('no such version')"])


@pytest.mark.parametrize("name", package_environment.NAMES)
def test_locks_pin_everything_and_begin_with_torch(name):
    pinned = package_environment.pins(name)
    assert next(iter(pinned)) == "torch" and pinned["torch"] == "torch==2.13.0"
    assert all(line.count("==") == 1 and " " not in line for line in pinned.values())
    lines = [line for line in package_environment.lock(name).read_text().splitlines() if line[:1] != "#"]
    assert len(lines) == len(pinned)
    assert name in package_worker.MODELS
