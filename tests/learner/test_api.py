"""`learner.train`: rewards and prompts as Python objects, configs from dicts, metrics and the LoRA back."""

import json
from pathlib import Path

import pytest
import torch

import learner
from learner import ConfigError, load_config
from rewards.registry import UnknownReward

PROMPTS = ["a red circle", "a blue\nring"]
QUIET = ("flow.fit_steps", "flow.warmup_steps")


def blue(images, prompts):
    return (images[:, 2] - images[:, 0]).mean((1, 2))


class Sharp:
    differentiable = True

    def __call__(self, images, prompts):
        return (images[:, :, 1:] - images[:, :, :-1]).square().mean((1, 2, 3))


@pytest.fixture
def small(small_config):
    settings = "run.runner=inprocess", "train.epochs=1", "evaluation.images=0", "flow.widths=[8,16]"
    return small_config(*settings).model_dump(mode="json")


@pytest.mark.long
def test_objects_train_as_their_names_do_and_the_same_call_goes_on(small, tmp_path):
    said = []

    def train(name, reward, settings=None, prompts=PROMPTS):
        return learner.train(small, settings, reward=reward, prompts=prompts, run_dir=tmp_path / name, say=said.append)

    run = train("run", blue)
    assert [line["epoch"] for line in run.metrics] == [0] and -1 <= run.metrics[0]["reward_mean"] <= 1
    assert (Path(run.lora) / "pytorch_lora_weights.safetensors").is_file()
    assert any("epoch 1/1" in line for line in said)
    saved = load_config(tmp_path / "run/config.yaml")
    assert (saved.reward.name, saved.prompts.path) == (f"{__name__}:blue", tuple(PROMPTS))
    again = train("run", blue)
    assert "nothing is left to do" in said and again.metrics == run.metrics
    with pytest.raises(ConfigError, match=r"prompts\.path: the run in .* has .*a red circle.*, not .*other"):
        train("run", blue, prompts=["other"])
    named = train("name", None, {"reward.name": f"{__name__}:blue"})
    other = train("other", lambda images, prompts: 1 - blue(images, prompts))
    sums = [run.metrics[-1]["adapter_sha256"] for run in (run, named, other)]
    assert sums[0] == sums[1] != sums[2]


def test_gradients_of_an_object(small, tmp_path):
    settings = {"objective.kind": "residual_nabla_db", "flow.stem_stride": 1} | dict.fromkeys(QUIET, 0)
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
        ({"settings": {"epochs": 1}}, r"epochs: unknown section; did you mean train\.epochs"),
        ({"config": "no/such.yaml"}, r"cannot read no/such\.yaml"),
        ({"prompts": [], "reward": "beauty"}, "(?s)holds no prompt.*unknown reward"),
    ],
)
def test_bad_input_is_named(small, arguments, match, tmp_path):
    with pytest.raises(ConfigError, match=match):
        learner.train(**{"config": small, "run_dir": str(tmp_path / "runs/run"), **arguments})
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_an_offset_that_is_not_given_is_the_mean_before_training_and_is_kept(small_config, tmp_path):
    """The preset's is of its own reward: with another one it is not given."""
    settings, said = {"objective.reward_offset": None, "evaluation.images": 4, "train.epochs": 1}, []
    small = small_config("run.runner=inprocess", "flow.widths=[8,16]").model_dump(mode="json")

    def train(name, offset, **more):
        given = settings | {"objective.reward_offset": offset} | more
        return learner.train(small, given, reward=blue, prompts=PROMPTS, run_dir=tmp_path / name, say=said.append)

    chosen = train("chosen", None)
    mean = float(f"{chosen.metrics[0]['eval_reward_mean']:.4g}")
    assert f"objective.reward_offset: {mean:g}, the mean reward before training" in said
    given, far = train("given", mean), train("far", 0.8)
    hashes = [run.metrics[-1]["adapter_sha256"] for run in (chosen, given, far)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert [line for line in said if line.startswith("warning: objective.reward_offset is 0.8, but the mean reward")]
    manifest = json.loads((tmp_path / "chosen/checkpoints/latest/state.json").read_text())
    assert manifest["reward_offset"] == mean  # what a resumed run goes on with
    (tmp_path / "chosen/evaluation/epoch-before.json").write_text('{"prompt": ["x"], "reward": [7.0]}')
    longer = [train(name, offset, **{"train.epochs": 2}) for name, offset in (("chosen", None), ("given", mean))]
    assert longer[0].metrics[-1]["adapter_sha256"] == longer[1].metrics[-1]["adapter_sha256"]


def test_a_reward_that_cannot_be_sent_to_another_process_is_said_with_the_ways_on(small, tmp_path, monkeypatch):
    def serialize(*_):
        raise TypeError("Could not serialize the argument ...") from TypeError("cannot pickle '_thread.lock' object")

    monkeypatch.setattr("actors.ray_runner.RayRunner", serialize)
    said = r"reward .*:blue cannot be sent .* \(cannot pickle '_thread\.lock' object\); put it into a file, as module:f"
    with pytest.raises(UnknownReward, match=said):
        learner.train(
            small, reward=blue, prompts=PROMPTS, runner="ray", run_dir=tmp_path / "run", say=lambda text: None
        )
