"""The command line: help, printed config, all faults at once, progress for logs and for terminals."""

import io
import json
import os
import re
import shutil
import sys

import pytest
import yaml
from brightness import clean as images
from brightness import scorer

from benchmarks.emulated import EmulatedScorer
from cluster import auth
from learner.config import DEFAULT_CONFIG, Config, known_keys, load_config
from learner.protocol.buffer import Buffer
from learner.run import main, say
from rewards import registry


def test_help_has_every_key_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for key, field in known_keys().items():
        (line,) = [line for line in said.splitlines() if line.split()[:1] == [key]]
        assert field.description and field.description in line and "(default: " in line
    kinds = {line.split()[0]: line.split()[1] for line in said.splitlines() if "(default: " in line}
    keys = ("sampler.actors", "prompts.path", "run.runner", "flow.widths", "reward.labels")
    assert [kinds[key] for key in keys] == ["int|none", "str|list|none", "choice", "list", "dict"]


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
        (("model.path=no/hub-id", "reward.name=nowhere:f"), ("no/hub-id", "cannot import 'nowhere:f'")),
        (("model.path=BROKEN", "run.runner=inprocess"), ("model.path: ", "BROKEN")),
        (("objective.kind=nabla_db", "reward.name=jpeg_incompressibility", "flow.fit_steps=0", "flow.warmup_steps=0",
          "flow.stem_stride=1"), ("jpeg_incompressibility is not differentiable",)),
        (("reward.options={colour: 3}",), ("reward.options",)),
        (("prompts.path=[a dog]",), ("a dog",)),  # which the reward cannot judge
        (("prompts.per_prompt=0", "prompts.path=/no/file"), ("prompts.per_prompt", "/no/file")),
    ],
)  # fmt: skip
def test_all_faults_are_said_at_once(settings, words, tiny_pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    shutil.copytree(tiny_pipeline, tmp_path / "BROKEN", ignore=shutil.ignore_patterns("unet"))
    settings = [text.replace("BROKEN", f"{tmp_path}/BROKEN") for text in settings]
    for plan in ([], ["--plan"]):
        assert main([*settings, f"run.dir={tmp_path / 'run'}", *plan]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words)
        assert "Traceback" not in said and not (tmp_path / "run").exists()
        assert all(line.startswith("learner.run: ") for line in said.splitlines())


def test_a_config_of_another_version_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "old.yaml").write_text(DEFAULT_CONFIG.read_text() + "config_version: 99\n")
    assert main(["--config", str(tmp_path / "old.yaml")]) == 2
    said = capsys.readouterr().err
    assert "config_version" in said and "version 99" in said and "old.yaml" in said


def test_a_cluster_that_does_not_answer_is_said_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(auth, "CONNECT_SECONDS", 1.0)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert main([f"run.dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "no Ray cluster answers at 127.0.0.1:1 within 1 s" in said and not (tmp_path / "run").exists()


def test_presets_and_model_are_found_and_a_run_is_placed_from_any_directory(light, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--plan"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/runs/shapes_alignment-")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where a submitted job's run is kept: its folder is removed
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


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_has_one_plain_line_an_epoch_and_a_terminal_a_bar(terminal, light, tmp_path, monkeypatch, capsys):
    error = io.StringIO()
    monkeypatch.setattr(error, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", error)
    assert main([*light, f"run.dir={tmp_path / 'run'}"]) == 0
    plain = capsys.readouterr().out
    lines, known = plain.splitlines(), "; that dag_db reaches its target is shown on 1-D problems alone"
    first = lines.index(f"what to expect: the reward is raised, held back by objective.regulariser=0.3{known}")
    assert "dag_db (corrected): target proportional to" in lines[first - 1]
    assert "\r" not in plain and len([line for line in plain.splitlines() if line.startswith("epoch ")]) == 3
    assert ("sampling and scoring: 4/4" in error.getvalue()) == ("\r" in error.getvalue()) == terminal


def test_a_reward_that_cannot_be_made_is_said_in_one_line_in_process_too(small_settings, tmp_path, monkeypatch, capsys):
    (tmp_path / "unmakeable.py").write_text("class R:\n    def __init__(self):\n        raise OSError('no weights')\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [*small_settings, "run.runner=inprocess", "reward.name=unmakeable:R", f"run.dir={tmp_path / 'run'}"]
    for status, more in ((2, []), (1, ["reward.try_first=false"])):  # tried before the run, or in it
        assert main([*arguments, *more]) == status
        assert "reward.name: unmakeable:R cannot be made: OSError: no weights" in capsys.readouterr().err
        assert (tmp_path / "run").exists() == (status == 1)


OWN = """
import sys, time

def leave(images, prompts):
    sys.exit(0)

def hang(images, prompts):
    time.sleep(60)

def raises(images, prompts):
    return {}["nope"]

def stop(images, prompts):
    raise GeneratorExit
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "leave",
            "BadReward: reward own_failing:leave failed .* SystemExit: 0 \\(at FILE:5 in leave: sys.exit\\(0\\)\\)",
        ),
        ("hang", "DeadlineExceeded: scoring .* took longer than run.chunk_seconds=0.5 s \\(at FILE:8 in hang"),
        ("raises", "BadReward: .* KeyError: 'nope' \\(at FILE:11 in raises"),
        ("stop", "BadReward: .* GeneratorExit \\(at FILE:14 in stop"),
    ],
)
def test_whatever_a_reward_does_fails_the_run_with_its_lines(name, said, light, tmp_path, monkeypatch, capsys):
    file = tmp_path / "own_failing.py"
    file.write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_failing", raising=False)
    monkeypatch.setattr(
        EmulatedScorer, "score", lambda self, clean: scorer(registry.load(f"own_failing:{name}")).score(images())
    )
    settings = [*light, f"reward.name=own_failing:{name}", "run.chunk_seconds=0.5", f"run.dir={tmp_path / 'run'}"]
    assert main([*settings, "reward.try_first=false"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("learner.run: ")]
    status = json.loads((tmp_path / "run/status.json").read_text())
    for text in (line, f"learner.run: {status['reason']}"):
        assert re.match(f"learner.run: {said.replace('FILE', str(file))}", text)
    assert status["state"] == "failed" and line.endswith("where traceback.txt says more")
    assert f'File "{file}"' in (tmp_path / "run/traceback.txt").read_text()


def test_a_run_goes_on_where_nobody_reads_its_lines(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        for text in ("first", "second"):
            say(text)


def test_a_run_that_anything_leaves_has_failed(light, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Buffer, "admit", lambda self: sys.exit(0))
    assert main([*light, f"run.dir={tmp_path / 'run'}"]) == 1
    assert "RunFailure: SystemExit was raised: 0; the same command goes on" in capsys.readouterr().err


def test_a_run_is_laid_out_as_format_5_says(finished_run):
    """Runs of other versions of this code are gone on with only while this holds."""
    files = "run.json", "checkpoints/latest/state.json"
    about, manifest = (json.loads((finished_run / name).read_text()) for name in files)
    assert set(about) == {
        "format", "run_id", "name", "created", "finished", "config_digest", "prompts_sha256", "environment", "cluster",
        "dimensions", "config_sha256", "failure", "changes", "sha256",
    }  # fmt: skip
    assert set(manifest) == {
        "format", "run_id", "mlflow_run_id", "step", "next_epoch", "prompts_drawn", "policy_version", "adapter_sha256",
        "run", "metrics_sha256", "ranks", "batch_sizes", "ledger", "reward_offset", "config_digest", "files", "sha256",
    }  # fmt: skip
    assert set(manifest["batch_sizes"]) == {"chunk", "flow_batch", "micro_batch", "score"}
    adapter = {"lora/pytorch_lora_weights.safetensors", "lora/kohya.safetensors"}
    assert set(manifest["files"]) == {"learner.pt", "replay-0.pt", "config.yaml", *adapter}
    assert {path.name for path in finished_run.iterdir()} == {
        "run.json", "run.lock", "config.yaml", "metrics.jsonl", "status.json", "trajectories", "evaluation",
        "checkpoints", "before.png", "after.png", "report.html",
    }  # fmt: skip
    names = {path.name for path in (finished_run / "evaluation").iterdir()}
    assert names == {f"epoch-{epoch}.{kind}" for epoch in ("before", "000001") for kind in ("json", "parquet", "png")}
