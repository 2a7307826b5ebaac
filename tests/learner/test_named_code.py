"""Code of a user's own runs where the command's config names it, never because a file of a run or a data file does."""

import sys

import pytest
import yaml
from test_prompts import write

from commands import report, upload
from learner.run import main

WITNESS = """
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()

def score(images, prompts):
    return images.mean((1, 2, 3))
"""
OWN = "def score(images, prompts):\n    return images.mean((1, 2, 3))\n"
THEIRS = "theirs_named_code"


@pytest.fixture
def settings(light, tmp_path, monkeypatch):
    """Of a run with a reward of one's own; another module, beside it, leaves a witness when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_named_code.py").write_text(OWN)
    (tmp_path / f"{THEIRS}.py").write_text(WITNESS)
    yield [*light, "reward.name=own_named_code:score", "train.epochs=1", "run.dir=run"]
    for name in (THEIRS, "own_named_code"):
        sys.modules.pop(name, None)


def ran(tmp_path) -> bool:
    return (tmp_path / f"{THEIRS}.ran").exists()


@pytest.mark.parametrize("with_upload", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_runs_own_files_import_nothing(with_upload, settings, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(settings) == 0
    for file in (run / "config.yaml", *run.glob("checkpoints/step-*/config.yaml")):
        tree = yaml.safe_load(file.read_text())
        tree["reward"] |= {"name": f"{THEIRS}:score"}
        file.write_text(yaml.safe_dump(tree))
    assert report.main([str(run)]) == 0
    assert not with_upload or upload.main([str(run), "--uri", f"sqlite:///{tmp_path}/mlflow.db"]) == 0
    for more in (["--plan"], ["train.epochs=2"]):
        assert main([*settings, *more]) == 2
        assert f"reward.name: the run in {run} has '{THEIRS}:score'" in capsys.readouterr().err
    assert not ran(tmp_path) and THEIRS not in sys.modules


def test_prompts_are_words_whatever_they_say(settings, tmp_path):
    said = [f"{THEIRS}:score", f"!!python/object/apply:importlib.import_module [{THEIRS}]"]
    for kind in ("txt", "jsonl", "json", "csv", "parquet"):
        assert main([*settings, f"prompts.path={write(tmp_path, kind, prompts=said)}", "--plan"]) == 0
    assert not ran(tmp_path) and THEIRS not in sys.modules
    assert main([*settings, f"reward.name={THEIRS}:score", "--plan"]) == 0
    assert ran(tmp_path)  # the witness would have been seen
