"""Every bad setting: one message naming key and remedy. What else the command refuses is in ../test_run.py."""

import pytest

from learner.config import DEFAULT_CONFIG, ConfigError, load_config
from learner.run import main


def faults(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    return str(caught.value).splitlines()


def test_all_faults_are_reported_at_once_each_with_its_key():
    assert faults("smapler.steps=5") == ["smapler: unknown section; did you mean sampler?"]
    assert faults("steps=5") == ["steps: unknown section; did you mean sampler.steps?"]
    messages = faults("train.epoch=3", "objective.beta=high", "nonsense", "sampler.steps=1", "flow=3", "run.seed.x=1")
    for start, word in [
        ("train.epoch: unknown key", "train.epochs"), ("objective.beta: ", "'high'"), ("nonsense: ", "key=value"),
        ("sampler.steps: ", "2"), ("flow: expected a section", "3"),
    ]:  # fmt: skip
        assert [word in message for message in messages if message.startswith(start)] == [True]
    contradictions = "sampler.chunk_size=24 train.updates_per_epoch=3 prompts.per_prompt=3 evaluation.images=100"
    for override in (*contradictions.split(), "model.device=tpu"):
        assert faults(override)[0].startswith(override.split("=")[0])


def test_an_eta_that_would_change_the_target_is_refused(capsys):
    assert faults("sampler.eta=1.5") == ["sampler.eta: Input should be less than or equal to 1, got 1.5"]
    assert main(["sampler.eta=0.5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sampler.eta: dag_db" in line and "use sampler.eta=1, or one of residual_nabla_db" in line


def test_settings_come_from_a_file_or_sections_with_overrides_as_text_or_objects():
    for preset in DEFAULT_CONFIG.parent.glob("*.yaml"):
        load_config(preset)
    assert load_config(overrides=["learner.learning_rate=1e-4"]).learner.learning_rate == 1e-4
    tree = load_config().model_dump(mode="json")
    assert load_config(tree) == load_config(DEFAULT_CONFIG) == load_config(str(DEFAULT_CONFIG))
    options = {"colour": 1e-5, "deep": {"key": "3"}}
    changed = load_config(tree, {"reward.options": options, "reward.options.more": None})
    assert changed.reward.options == {**options, "more": None} and load_config(tree).reward.options == {}


@pytest.mark.parametrize("path", ["/no/config.yaml", "/tmp", "NOT_YAML", "LIST"])
def test_an_unreadable_file_is_named(path, tmp_path):
    (tmp_path / "NOT_YAML").write_text("a: [\xff")
    (tmp_path / "LIST").write_text("[1]")
    with pytest.raises(ConfigError, match=f"--config: cannot read .*{path}"):
        load_config(path if path.startswith("/") else tmp_path / path)


def test_overrides_stand_on_both_sides_of_the_config_and_a_run_of_the_first_version_is_kept(tmp_path, capsys):
    assert main(["run.sed=1", "--config", str(DEFAULT_CONFIG), "train.epoch=2", f"run.dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "run.sed" in error and "train.epoch" in error
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert main([f"run.dir={tmp_path}"]) == 2
    assert "holds a run of an older Tributary" in capsys.readouterr().err
