"""The command line: help, printed config, all faults at once, progress for logs and for terminals."""

import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios

import pytest
import yaml

from cluster import auth
from learner.config import DEFAULT_CONFIG, Config, known_keys, load_config
from learner.run import main


def test_help_has_every_key_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for key, field in known_keys().items():
        (line,) = [line for line in said.splitlines() if line.split()[:1] == [key]]
        assert field.description in line and "(default: " in line
    line = next(line for line in said.splitlines() if "sampler.actors" in line.split()[:1])
    assert "int|none" in line


def test_the_printed_config_reads_back_as_the_same(tmp_path, capsys):
    assert main(["--print-config", "run.seed=5", "sampler.chunk_size=8"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(text)
    assert load_config(tmp_path / "mine.yaml") == load_config(overrides=["run.seed=5", "sampler.chunk_size=8"])
    assert set(yaml.safe_load(text)) == set(Config.model_fields)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (  # found before torch is imported
            ("run.sed=1", "objective.beta=high", "prompts.path=/no/prompts.txt", "model.path=/no/model",
             "reward.name=beauty"),
            ("run.sed", "did you mean run.seed", "objective.beta", "/no/prompts.txt", "/no/model", "beauty"),
        ),
        (  # found after it
            ("sampler.steps=999", "sampler.grid=dpm_solver", "reward.weights=/no/weights", "learner.gpus=64",
             "evaluation.held_out=[nicer]"),
            ("sampler.steps", "reward.weights", "128 GPUs", "nicer"),
        ),
    ],
)  # fmt: skip
def test_all_faults_are_said_at_once(settings, words, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main([*settings, f"run.dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert "Traceback" not in said and not (tmp_path / "run").exists()
    assert all(line.startswith("learner.run: ") for line in said.splitlines())


def test_a_config_of_another_version_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(DEFAULT_CONFIG.read_text() + "config_version: 99\n")
    assert main(["--config", str(tmp_path / "old.yaml")]) == 2
    said = capsys.readouterr().err
    assert "config_version" in said and "version 99" in said and "old.yaml" in said


def test_a_cluster_that_does_not_answer_is_said_before_anything_starts(small_settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(auth, "CONNECT_SECONDS", 4.0)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main([*small_settings, f"run.dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "no Ray cluster answers at 127.0.0.1:1 within 4 s" in said and not (tmp_path / "run").exists()


def test_presets_and_model_are_found_from_any_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--plan"]) == 0
    assert f"{tmp_path}/runs/shapes_alignment-" in capsys.readouterr().out


def test_a_submitted_job_keeps_its_run_out_of_the_working_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for override, place in [
        ([], f"{tmp_path}/home/tributary/runs/shapes_alignment-"),
        (["run.dir=mine"], f"{tmp_path}/home/tributary/mine"),
        (["run.dir=mine", "run.root=/data"], "/data/mine"),
        (["run.dir=mine", "run.root=memory://bucket/x"], "memory:///bucket/x/mine"),
        (["run.dir=/abs/mine"], "/abs/mine"),
    ]:
        assert main(["--plan", *override]) == 0
        assert place in capsys.readouterr().out


@pytest.mark.slow
def test_a_log_has_one_plain_line_an_epoch_and_a_terminal_a_bar(small_settings, tmp_path):
    command = [sys.executable, "-m", "learner.run", *small_settings, "run.runner=inprocess"]
    plain = subprocess.run([*command, f"run.dir={tmp_path / 'a'}"], capture_output=True, text=True, timeout=120)
    assert plain.returncode == 0 and "\r" not in plain.stdout + plain.stderr
    assert len([line for line in plain.stdout.splitlines() if line.startswith("epoch ")]) == 2
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown = subprocess.Popen([*command, f"run.dir={tmp_path / 'b'}"], stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    bars = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        bars += part
    said = shown.communicate(timeout=60)[0]
    assert shown.returncode == 0 and "sampling and scoring: 2/2" in bars.decode() and "\r" not in said


def test_a_model_with_a_part_missing_is_refused_before_anything_is_made(
    small_settings, tiny_pipeline, tmp_path, capsys
):
    broken = tmp_path / "model"
    shutil.copytree(tiny_pipeline, broken)
    shutil.rmtree(broken / "unet")
    for extra in ([], ["--plan"]):
        assert main([*small_settings, f"model.path={broken}", f"run.dir={tmp_path / 'run'}", *extra]) == 2
        said = capsys.readouterr().err
        assert str(broken) in said and "Traceback" not in said and not (tmp_path / "run").exists()


def test_a_reward_that_cannot_be_made_is_said_in_one_line_in_process_too(small_settings, tmp_path, monkeypatch, capsys):
    (tmp_path / "unmakeable.py").write_text("class R:\n    def __init__(self):\n        raise OSError('no weights')\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [*small_settings, "run.runner=inprocess", "reward.name=unmakeable:R", f"run.dir={tmp_path / 'run'}"]
    assert main(arguments) == 1
    assert "reward.name: unmakeable:R cannot be made: OSError: no weights" in capsys.readouterr().err
