"""Sweeps: which runs a file means, going on, failures, the comparison at the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from commands import sweep
from commands.sweep import main, plan
from learner.config import ConfigError


def planned(tree, *overrides):
    return plan(tree, overrides, Path("sweep.yaml"))[1]


def test_a_grid_is_every_combination_of_each_run():
    found = planned({"runs": [{"objective.beta": 10}, {"objective.beta": 20}], "grid": {"run.seed": [1, 2]}})
    assert [one.settings for one in found] == [
        (f"objective.beta={beta}", f"run.seed={seed}") for beta in (10, 20) for seed in (1, 2)
    ]
    assert [one.name for one in found][:2] == ["00-beta_10-seed_1", "01-beta_10-seed_2"]


def test_values_of_every_kind_come_through():
    (one,) = planned({"runs": [{"flow.widths": [32, 64], "mlflow.experiment": "my sweep", "lora.alpha": None}]})
    assert one.settings == ("flow.widths=[32, 64]", "mlflow.experiment=my sweep", "lora.alpha=null")
    assert "/" not in one.name and " " not in one.name


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"run": []}, "expected the keys config, runs, grid, got run"),
        ([], "expected the keys"),
        ({"runs": {"objective.beta": 1}}, "runs: expected a list of settings"),
        ({"grid": {"run.seed": 1}}, "grid: expected settings with lists"),
        ({"grid": {"run.seed": list(range(65))}}, "65 runs; at most 64"),
        ({"runs": [{"objective.bta": 1}, {"run.seed": "x"}]}, "run 00-bta_1: objective.bta: unknown key"),
        ({"runs": [{"run.dir": "here"}]}, "run.dir is the sweep's own business"),
        ({"config": "/no/such.yaml"}, "cannot read /no/such.yaml"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(tree, said, tmp_path, capsys):
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        planned(tree)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(tree))
    assert main([str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_file_that_is_none_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.fixture
def settings(small_settings):
    return [*small_settings, "run.runner=inprocess", "train.epochs=1", "prompts.path=configs/prompts/shapes_common.txt"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump({"grid": {"learner.learning_rate": [0.001, 0.1]}}))
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUTARY_CACHE", str(tmp_path / "cache"))


def test_each_run_is_asked_for_in_its_folder_and_group_and_those_that_finished_are_compared(
    file, tmp_path, monkeypatch, capsys
):
    asked, compared = [], []
    monkeypatch.setattr(sweep, "_follow", lambda command: asked.append(command) or len(asked) % 2)  # the first fails
    monkeypatch.setattr(sweep, "_is_finished", lambda storage: "01-" in str(storage))
    monkeypatch.setattr(sweep.compare, "main", lambda arguments: compared.append(arguments) or 0)
    assert main([str(file), "--out", str(tmp_path / "out"), "run.seed=7"]) == 1
    for command, name, rate in zip(
        asked, ("00-learning_rate_0.001", "01-learning_rate_0.1"), ("0.001", "0.1"), strict=True
    ):
        settings = {f"learner.learning_rate={rate}", f"run.dir={tmp_path}/out/{name}", "run.resume=auto", "run.seed=7"}
        assert settings | {"mlflow.group=rates"} <= set(command)
    assert compared == [[f"{tmp_path}/out/01-learning_rate_0.1", "--out", f"{tmp_path}/out/comparison", "run.seed=7"]]
    assert "failed: 00-learning_rate_0.001; the same command tries them again" in capsys.readouterr().err


def test_told_to_end_while_a_run_goes_it_tells_the_run(tmp_path, monkeypatch):
    said = tmp_path / "said"
    wait = f"import signal, sys, time; signal.signal(15, lambda *_: (open({str(said)!r}, 'w').close(), sys.exit(0)))\n"
    wait += f"open({str(tmp_path / 'up')!r}, 'w').close(); time.sleep(60)"

    def interrupted(process, seconds, real=subprocess.Popen.wait):
        if seconds == sweep.POLL_SECONDS and (tmp_path / "up").exists():
            raise KeyboardInterrupt
        return real(process, seconds)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep._follow([sys.executable, "-c", wait])
    assert said.exists()


@pytest.mark.slow
def test_runs_are_made_once_and_compared(file, settings, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    assert main([str(file), "--out", str(out), *settings]) == 0
    names = ["00-learning_rate_0.001", "01-learning_rate_0.1"]
    assert [one["name"] for one in json.loads((out / "comparison/comparison.json").read_text())] == names
    assert (out / "comparison/pareto.png").exists()
    kept = {name: (out / name / "metrics.jsonl").stat().st_mtime_ns for name in names}
    assert main([str(file), "--out", str(out), *settings]) == 0
    assert {name: (out / name / "metrics.jsonl").stat().st_mtime_ns for name in names} == kept
    assert "nothing is left to do" in capfd.readouterr().out


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others_and_is_tried_again(file, settings, tmp_path, monkeypatch, capfd):
    real, asked = sweep._follow, []

    def follow(command):
        asked.append(next(part for part in command if part.startswith("run.dir=")))
        return 1 if len(asked) == 1 else real(command)

    monkeypatch.setattr(sweep, "_follow", follow)
    out = tmp_path / "out"
    assert main([str(file), "--out", str(out), *settings]) == 1
    said = capfd.readouterr().err
    assert (
        "00-learning_rate_0.001 ended with status 1; going on" in said and "the same command tries them again" in said
    )
    assert len(json.loads((out / "comparison/comparison.json").read_text())) == 1
    assert main([str(file), "--out", str(out), *settings]) == 0
    assert len(asked) == 4 and len(json.loads((out / "comparison/comparison.json").read_text())) == 2


def test_a_plan_starts_nothing(file, tmp_path, capsys):
    assert main([str(file), "--out", str(tmp_path / "out"), "--plan"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "01-learning_rate_0.1  learner.learning_rate=0.1"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_told_to_end_it_ends_its_run_too_and_goes_on_later(file, settings, tmp_path):
    out = tmp_path / "out"
    long = [*settings, "train.epochs=200"]
    command = [sys.executable, "-m", "learner.sweep", str(file), "--out", str(out), *long]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    metrics = out / "00-learning_rate_0.001/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and "the same command goes on" in said
    lock = subprocess.run(["pgrep", "-f", f"run.dir={out}"], capture_output=True, text=True, timeout=10)
    assert lock.stdout == "", "its run is still there"
    assert not (out / "01-learning_rate_0.1").exists()
