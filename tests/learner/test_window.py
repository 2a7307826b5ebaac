"""objective.window=auto: measured once before training, kept in run.json, and gone by whoever reads the run."""

import json
import shutil

import pytest
import yaml

from commands import report, settled
from evaluation import settling
from learner.config import ConfigError, given_config, saved_config
from learner.run import main
from records.run_folder import Records
from records.storage import Storage, StorageError

AUTO = ("objective.window=auto", "objective.last_transition=train", "sampler.steps=5", "objective.penalty=squared")


@pytest.fixture
def go(light, monkeypatch, tmp_path):
    monkeypatch.setenv("TRIBUTARY_CACHE", str(tmp_path / "cache"))
    return lambda folder, *settings: main([*light, *AUTO, f"run.dir={folder}", *settings])


def records(folder) -> Records:
    return Records.open(Storage(str(folder)))


def test_it_is_measured_before_training_and_a_resumed_run_goes_on_with_it(go, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    assert go(folder) == 0
    said = capsys.readouterr().out
    known = json.loads((folder / "run.json").read_text())["settled"]
    assert known["window"] == [0, 2] and known["steps"] == 5 and [each["state"] for each in known["profile"]][-1] == 5
    assert "transitions 0 to 2 settle 0.95 of it" in said and "behind those trained, are free" in said
    assert yaml.safe_load((folder / "config.yaml").read_text())["objective"]["window"] == "auto"
    assert given_config(records(folder)).objective.window == "auto"
    assert saved_config(records(folder)).objective.window == (0, 2)
    shutil.rmtree(folder / "checkpoints/step-000006")
    records(folder).note(finished=False)
    monkeypatch.setattr(settling, "measure", None)  # it is known
    assert go(folder) == 0 and json.loads((folder / "run.json").read_text())["settled"] == known
    assert go(folder, "objective.window=[0, 2]") == 2  # other settings
    assert "objective.window: the run in" in capsys.readouterr().err


def test_the_same_paths_serve_another_run_and_the_command(go, light, tmp_path, capsys, monkeypatch):
    assert go(tmp_path / "one") == 0
    first = records(tmp_path / "one").about["settled"]
    monkeypatch.setattr("learner.api.pools_for", None)  # nothing is drawn
    assert go(tmp_path / "two", "objective.window_share=0.9") == 0
    assert records(tmp_path / "two").about["settled"] == first
    capsys.readouterr()
    assert settled.main([str(tmp_path / "one")]) == 0
    assert "objective.window=[0, 2]" in capsys.readouterr().out
    assert settled.main([str(tmp_path / "one"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first["profile"]
    assert settled.main([str(tmp_path / "nowhere")]) == 2
    assert "there is no run, and no config file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"window": [0, 5]}, {"window": [3, 2]}, {"window": [-1, 2]}, {"window": "x"}, {"window": [0]}, {"profile": []},
     {"profile": [{"state": 0, "share": 1e300, "low": 0.0, "high": 0.0}]}, {"steps": 1e9},
     {"profile": [{"state": 9, "share": 0.5, "low": 0.0, "high": 1.0}]}],
)  # fmt: skip
def test_a_damaged_one_is_read_from_the_checkpoint_or_said(go, change, tmp_path, capsys):
    folder = tmp_path / "run"
    assert go(folder, "train.epochs=1") == 0
    records(folder).note(settled={**records(folder).about["settled"], **change})  # whole and sealed
    assert saved_config(records(folder)).objective.window == (0, 2)  # the checkpoint's copy
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(StorageError, match=r"run\.json"):
        records(folder)
    capsys.readouterr()
    assert report.main([str(folder)]) == 2 and "run.json" in capsys.readouterr().err


def test_one_of_other_steps_is_said(go, tmp_path):
    assert go(tmp_path / "run", "train.epochs=1") == 0
    about = records(tmp_path / "run").about["settled"]
    records(tmp_path / "run").note(settled={**about, "steps": 7, "profile": about["profile"]})
    with pytest.raises(ConfigError, match="its window is of 7 steps, not of 5"):
        saved_config(records(tmp_path / "run"))
