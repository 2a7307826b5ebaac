"""Every bad setting: one message naming key and remedy. What else the command refuses is in ../test_run.py."""

import pytest

from learner.config import DEFAULT_CONFIG, Config, ConfigError, load_config
from learner.objectives.needs import NEEDS
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


def test_a_package_is_no_setting_any_more_and_configs_of_before_are_read():
    assert load_config({"reward": {"name": "hpsv2", "backend": "native"}}).reward.name == "hpsv2"
    assert load_config(overrides=["reward.backend=native"]) == load_config()
    (line,) = faults("reward.backend=package")
    assert "reward.backend" in line and "rewards.serve NAME --package" in line and "reward.name=remote" in line


def test_an_eta_that_would_change_the_target_is_refused(capsys):
    assert faults("sampler.eta=1.5") == ["sampler.eta: Input should be less than or equal to 1, got 1.5"]
    assert main(["sampler.eta=0.5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sampler.eta: dag_db" in line and "use sampler.eta=1, or one of residual_nabla_db" in line
    assert main(["sampler.kernel=flow_grpo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sampler.kernel: dag_db" in line and "use sampler.kernel=ddim, or one of residual_nabla_db" in line
    (said,) = faults("sampler.kernel=calibrated", "sampler.spread=[1, 1]")
    assert said == "sampler.spread: it is of 2 steps, not of sampler.steps 10; or set sampler.kernel=ddim"
    assert load_config(overrides=["sampler.kernel=flow_grpo"]).sampler.eta == 0.7
    assert load_config(overrides=["sampler.kernel=flow_grpo", "sampler.eta=0.5"]).sampler.eta == 0.5


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
    assert "holds metrics.jsonl and no run of this Tributary" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override",
    ["run.seed=99999999999999999999", "evaluation.seed=99999999999999999999", "train.epochs=100000000000000000000000",
     "objective.beta=1e400", f"run.dir=/tmp/{'x' * 300}"],
)  # fmt: skip
def test_numbers_and_names_beyond_all_measure_are_refused_at_once(override, capsys):
    assert main([override, "--plan"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert override.partition("=")[0] in line and len(line) < 500


def test_a_key_given_twice_is_named_and_a_section_without_keys_has_the_defaults(tmp_path):
    (file := tmp_path / "some.yaml").write_text("train: {epochs: 3}\nreward:\n# name: aesthetic\n")
    assert (load_config(file).train.epochs, load_config(file).reward) == (3, Config().reward)
    for text in ("train: {epochs: 3, epochs: 4}\n", "train: {epochs: 3}\nrun: {seed: 1}\ntrain: {epochs: 4}\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"(epochs|train) is given twice.*line [13]"):
            load_config(file)


def test_files_that_are_nested_too_deeply_or_have_numbers_for_keys_are_named(tmp_path, capsys):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "numbers.yaml").write_text("1: 2\nrun: {3: 4}\n")
    assert main([f"prompts.path={tmp_path}/deep.json", "--plan"]) == 2 and "deep.json" in capsys.readouterr().err
    (tmp_path / "deep.yaml").write_text("run: " + "[" * 10_000)
    assert main(["--config", f"{tmp_path}/deep.yaml", "--plan"]) == 2 and "deep.yaml: " in capsys.readouterr().err
    assert main(["--config", f"{tmp_path}/numbers.yaml", "--plan"]) == 2
    said = capsys.readouterr().err
    assert "run.3: unknown key" in said and "1: unknown section" in said


def test_an_offset_in_a_file_is_of_the_files_reward():
    for overrides, offset in (
        ((), 0.8), (["reward.name=shapes_alignment"], 0.8), (["reward.name=mine:f"], None),
        (["reward.options.by=2"], None), (["reward.name=mine:f", "objective.reward_offset=0.3"], 0.3),
        (["reward.name=mine:f", "objective.setting=faithful"], 0.0),
    ):  # fmt: skip
        assert load_config(DEFAULT_CONFIG, overrides).objective.reward_offset == offset
        assert load_config(overrides=overrides) == load_config(DEFAULT_CONFIG, overrides)
    assert load_config(load_config(), ["reward.name=mine:f"]).objective.reward_offset == 0.8  # their author's own


def test_an_objective_that_a_presets_other_settings_contradict_names_a_preset_that_has_its_own():
    for kind in NEEDS:
        preset = DEFAULT_CONFIG.parent / f"shapes_{'alignment' if kind == 'dag_db' else kind}.yaml"
        said = [] if NEEDS[kind].flow == "log_flow" else faults(f"objective.kind={kind}")[-1:]
        own = f"those for {kind} are in --config configs/{preset.name}"
        known = own if preset.is_file() else f"leave out what is not for {kind}"
        assert said == [f"objective.kind: shapes_alignment.yaml has settings for dag_db; {known}"] * len(said)
        assert len(said) == (NEEDS[kind].flow != "log_flow")
        assert not preset.is_file() or load_config(preset).objective.kind == kind
    assert not any("--config" in fault for fault in faults("sampler.chunk_size=24"))


def test_a_value_of_another_shape_is_answered_with_one_that_would_do():
    for override, said in (
        (
            "evaluation.held_out=aesthetic",
            "evaluation.held_out: expected a list, as in evaluation.held_out=[aesthetic]",
        ),
        ("flow.widths=32", "flow.widths: expected a list, as in flow.widths=[32]"),
        ("reward.options=3", "reward.options: expected keys with values, as in reward.options={key: value}"),
        ("run.runner=in-process", "run.runner: Input should be 'ray' or 'inprocess', got 'in-process'; did you mean"),
    ):
        assert faults(override)[0].startswith(said)
    assert load_config(None, "train.epochs=3").train.epochs == 3  # one alone
