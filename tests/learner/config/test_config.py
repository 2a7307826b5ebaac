"""Every bad input: one message naming key and remedy, exit 2, nothing written."""

import pytest

from learner.config import DEFAULT_CONFIG, ConfigError, known_keys, load_config
from learner.run import main


def faults(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    return str(caught.value).splitlines()


def test_all_faults_are_reported_at_once_each_with_its_key():
    assert faults("smapler.steps=5") == ["smapler: unknown section; did you mean sampler?"]
    messages = faults("train.epoch=3", "objective.beta=high", "nonsense", "sampler.steps=1")
    assert any(m.startswith("train.epoch:") and "train.epochs" in m for m in messages)
    assert any(m.startswith("objective.beta:") and "'high'" in m for m in messages)
    assert any(m.startswith("nonsense") for m in messages)
    assert any(m.startswith("sampler.steps:") for m in messages)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["sampler.chunk_size=24"], "sampler.chunk_size"),
        (["train.updates_per_epoch=3"], "train.updates_per_epoch"),
        (["prompts.per_prompt=3"], "prompts.per_prompt"),
        (["evaluation.images=100"], "evaluation.images"),
    ],
)
def test_contradictions_name_their_key(overrides, key):
    assert faults(*overrides)[0].startswith(key)


def test_numbers_in_yaml_exponent_form_are_numbers():
    assert load_config(overrides=["learner.learning_rate=1e-4"]).learner.learning_rate == 1e-4


def test_presets_are_valid():
    for preset in DEFAULT_CONFIG.parent.glob("*.yaml"):
        load_config(preset)


def test_every_key_is_described():
    assert all(field.description for field in known_keys().values())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run.sed=1"], "did you mean run.seed"),
        (["prompts.path=/no/such.txt"], "/no/such.txt"),
        (["model.path=/no/model"], "/no/model"),
        (["reward.name=beauty"], "shapes_alignment"),
        (["reward.name=nowhere:f"], "nowhere"),
        (["--config", "/no/config.yaml"], "/no/config.yaml"),
        (["--config", "/tmp"], "/tmp"),
        (["model.path=no/hub-id"], "no/hub-id"),
        (["model.device=tpu"], "model.device"),
        (["sampler=3"], "sampler"),
        (["reward.options={colour: 3}"], "reward.options"),
    ],
)
def test_bad_input_exits_2_with_one_line_and_writes_nothing(arguments, named, tmp_path, capsys):
    assert main([*arguments, f"run.dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert named in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_overrides_may_stand_on_both_sides_of_the_config(tmp_path, capsys):
    config = str(DEFAULT_CONFIG)
    assert main(["run.sed=1", "--config", config, "train.epoch=2", f"run.dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "run.sed" in error and "train.epoch" in error


def test_a_prompt_that_the_reward_cannot_judge_is_named_before_the_start(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a dog\n")
    assert main([f"prompts.path={tmp_path / 'prompts.txt'}", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "a dog" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_prompt_file_that_is_empty_or_not_utf8_is_refused(tmp_path, capsys):
    for content in (b"# only a comment\n", b"\xff\xfe bad"):
        (tmp_path / "prompts.txt").write_bytes(content)
        assert main([f"prompts.path={tmp_path / 'prompts.txt'}", f"run.dir={tmp_path / 'run'}"]) == 2
        assert "prompts.txt" in capsys.readouterr().err


def test_an_existing_run_of_the_first_version_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert main([f"run.dir={tmp_path}"]) == 2
    assert "holds a run of an older Tributary" in capsys.readouterr().err
