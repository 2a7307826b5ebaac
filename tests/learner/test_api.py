"""`learner.train`: rewards and prompts as Python objects, configs from dicts, metrics and the LoRA back."""

import json
from pathlib import Path

import pytest
import torch

import learner
from learner import ConfigError, load_config


def blue(images, prompts):
    """How much bluer than red."""
    return (images[:, 2] - images[:, 0]).mean((1, 2))


class Sharp:
    differentiable = True

    def __call__(self, images, prompts):
        return (images[:, :, 1:] - images[:, :, :-1]).square().mean((1, 2, 3))


@pytest.fixture
def small(small_config):
    """The small run as sections of keys."""
    return small_config("run.runner=inprocess").model_dump(mode="json")


def test_a_function_and_a_list_of_prompts(small, tmp_path):
    said = []
    prompts = ["a red circle", "a blue\nring"]
    run = learner.train(small, reward=blue, prompts=prompts, run_dir=tmp_path / "run", say=said.append)
    assert [line["epoch"] for line in run.metrics] == [-1, 0, 1]
    assert all(-1 <= line["reward_mean"] <= 1 for line in run.metrics[1:])
    assert (Path(run.lora) / "pytorch_lora_weights.safetensors").is_file()
    assert any("epoch 2/2" in line for line in said)
    assert json.loads((tmp_path / "run/prompts.json").read_text()) == prompts
    saved = load_config(tmp_path / "run/config.yaml")
    assert saved.reward.name == f"{__name__}:blue"
    assert saved.prompts.path == str(tmp_path / "run/prompts.json")

    again = learner.train(small, reward=blue, prompts=prompts, run_dir=tmp_path / "run", say=said.append)
    assert "nothing is left to do" in said and again.metrics == run.metrics
    with pytest.raises(ConfigError, match=r"prompts: .* began with others"):
        learner.train(small, reward=blue, prompts=["other"], run_dir=tmp_path / "run", say=said.append)
    assert json.loads((tmp_path / "run/prompts.json").read_text()) == prompts


def test_the_reward_object_is_the_one_that_trains(small, tmp_path):
    quiet = {"say": lambda text: None}
    objects = learner.train(small, reward=blue, run_dir=tmp_path / "object", **quiet)
    named = learner.train(small, {"reward.name": f"{__name__}:blue"}, run_dir=tmp_path / "name", **quiet)
    other = learner.train(
        small, reward=lambda images, prompts: 1 - blue(images, prompts), run_dir=tmp_path / "o", **quiet
    )
    sums = [run.metrics[-1]["adapter_sha256"] for run in (objects, named, other)]
    assert sums[0] == sums[1] != sums[2]


def test_gradients_of_an_object(small, tmp_path, settings_of):
    settings = {"objective.kind": "residual_nabla_db", "flow.widths": [8, 16], "flow.stem_stride": 1,
                "flow.fit_steps": 0, "flow.warmup_steps": 0}  # fmt: skip
    del small["objective"]
    run = learner.train(small, settings, reward=Sharp(), run_dir=tmp_path / "run", say=lambda text: None)
    assert torch.isfinite(torch.tensor(run.metrics[-1]["loss"]))
    with pytest.raises(ConfigError, match="is not differentiable"):
        learner.train(small, settings, reward=blue, run_dir=tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"settings": {"run.sed": 1}}, r"run\.sed: unknown key; did you mean run\.seed"),
        ({"settings": {"epochs": 1}}, "epochs: expected section.key"),
        ({"config": "no/such.yaml"}, r"cannot read no/such\.yaml"),
        ({"prompts": ["a"], "run_dir": "memory://run"}, "need a local run.dir"),
        ({"reward": "beauty"}, "unknown reward 'beauty'"),
        ({"prompts": []}, "holds no prompt"),
    ],
)
def test_bad_input_is_named(small, arguments, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        learner.train(**{"config": small, "run_dir": str(tmp_path / "runs/run"), **arguments})
    assert not (tmp_path / "runs").exists()
