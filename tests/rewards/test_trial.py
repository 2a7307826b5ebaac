"""Rewards tried before a run, and what they say of themselves."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from brightness import clean, scorer

from learner import run
from learner.config import ROOT, load_config
from learner.trial import faults
from rewards import contract, registry
from rewards.registry import BadReward
from rewards.trial import try_reward

OWN = """
import torch

def bright(images, prompts):
    return images.mean((1, 2, 3))

def one(images):
    return images.mean((1, 2, 3))

def short(images, prompts):
    return images.mean((1, 2, 3))[:1]

def column(images, prompts):
    return images.mean((2, 3))

def pair(images, prompts):
    return images.mean((1, 2, 3)), {}

def nothing(images, prompts):
    pass

def elsewhere(images, prompts):
    return torch.empty(len(images), device="meta")

def nan(images, prompts):
    return images.mean((1, 2, 3)) / 0 * 0

def raises(images, prompts):
    return table[prompts[0]]

def out_of_range(images, prompts):
    return images.mean((1, 2, 3)) + 7
out_of_range.range = (0, 1)

def detached(images, prompts):
    return images.detach().mean((1, 2, 3))
detached.differentiable = True

def steep(images, prompts):
    return (images * 0).sqrt().sum((1, 2, 3))
steep.differentiable = True

def dear(images, prompts):
    return images.mean((1, 2, 3))
dear.image_only = True

def wants(images, prompts, metadata):
    return torch.tensor([float(row["count"]) for row in metadata])

def needs(images, prompts, metadata):
    return torch.zeros(len(images))
needs.columns = ("count",)

class Made:
    def __init__(self, by=1.0, device="none"):
        self.by, self.device = by, device
        if device == "none":
            raise RuntimeError("no device")
    def __call__(self, images, prompts):
        return self.by * images.mean((1, 2, 3))

class NotMade:
    def __init__(self):
        torch.zeros(1, device="cuda:99")
    def __call__(self, images, prompts):
        pass

class Mute:
    pass
"""
SIZES = "on two made-up pictures of 64 x 64 with the prompts 'a .*' and 'a .*'"
WRONG = [
    ("nosuch", {}, "reward.name: cannot import 'own_trial:nosuch'.*no attribute 'nosuch'"),
    ("one", {}, r"own_trial:one takes \(images\), expected \(images, prompts\) and, if it likes, metadata"),
    ("short", {}, rf"own_trial:short failed {SIZES}: ValueError: it returned shape \[1\], expected \[2\]"),
    ("column", {}, r"shape \[2, 3\], expected \[2\], a score for each image: reduce"),
    ("pair", {}, "it returned a tuple, expected a tensor of 2 scores"),
    ("nothing", {}, "it returned a NoneType, expected a tensor of 2 scores"),
    ("elsewhere", {}, "it returned a Tensor, expected a tensor of 2 scores: .*meta"),
    ("nan", {}, r"it returned \[.*nan.*\], expected finite numbers"),
    ("raises", {}, r"NameError: name 'table' is not defined \(at .*own_trial\.py:\d+ in raises: return table\["),
    ("out_of_range", {}, "it returned 7.*, outside of its range, 0 to 1"),
    ("detached", {"--config": "configs/shapes_nabla_db.yaml"}, "autograd finds no way from its scores back"),
    ("steep", {"--config": "configs/shapes_nabla_db.yaml"}, "its gradient to the images is not finite"),
    ("dear", {}, r"judges finished pictures alone, and dag_db asks it at every .* objective\.forward_looking=none"),
    ("wants", {}, r"KeyError: .*no column 'count'; it has none \(prompts\.path\).*\(at .*own_trial\.py"),
    ("needs", {}, r"needs a column 'count', which \d+ of \d+ prompts do not have, the first 'a .*: none"),
    ("Made", {"reward.options": {"bye": 2}}, r"reward\.options: own_trial:Made has no bye; it takes by"),
    ("bright", {"reward.options": {"by": 2}}, r"reward\.options: own_trial:bright has no by; it takes images, prompts"),
    ("NotMade", {}, r"own_trial:NotMade cannot be made: .*\(at .*own_trial\.py:\d+ in __init_.*\.try_first=false"),
    ("Mute", {}, r"own_trial:Mute made a Mute, expected what takes \(images, prompts\)"),
]  # fmt: skip


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_trial.py").write_text(OWN)
    (tmp_path / "own_syntax.py").write_text("def f(images, prompts)\n    pass\n")
    (tmp_path / "own_import.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_trial", "own_syntax", "own_import"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def arguments(settings: dict) -> list[str]:
    return [f"{key}={json.dumps(value) if isinstance(value, dict) else value}" for key, value in settings.items()]


@pytest.mark.parametrize(("name", "settings", "said"), WRONG, ids=[name for name, *_ in WRONG])
def test_a_wrong_reward_is_said_in_one_line_before_anything_is_loaded(name, settings, said, own, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "learner.api", None)  # what loads models: importing it would raise
    given = {"reward.name": f"own_trial:{name}", "run.dir": own / "run", **settings}
    assert run.main(arguments(given)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(said, line), line
    assert "quarantine" not in line and not (own / "run").exists()


@pytest.mark.parametrize(("module", "word"), [("own_syntax", "SyntaxError"), ("own_import", "no_such_package")])
def test_a_file_that_cannot_be_imported_is_named_with_its_line(module, word, own, capsys):
    assert run.main([f"reward.name={module}:f", f"run.dir={own / 'run'}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(rf"{word}.*{module}\.py:1", line), line


def test_what_is_right_passes_and_a_class_gets_a_device(own):
    config = load_config(None, {"reward.name": "own_trial:Made", "reward.options": {"by": 2.0}})
    assert faults(config) == []
    assert registry.load("own_trial:Made", device="cpu").function.device == "cpu"
    config = load_config("configs/shapes_ddpo.yaml", {"reward.name": "own_trial:dear"})
    assert faults(config) == []


def test_models_with_weights_are_tried_only_as_a_whole_and_held_out_rewards_too(own):
    aesthetic = {"reward.name": "aesthetic", "reward.weights": str(own / "absent.pth")}
    config = load_config(None, aesthetic)
    assert faults(config) == [] and "absent.pth" in faults(config, whole=True)[0]
    term = {"name": "aesthetic", "weight": 1.0, "weights": str(own / "absent.pth")}
    config = load_config(None, {"reward.name": "weighted_sum", "reward.options": {"terms": [term]}})
    assert faults(config) == [] and "absent.pth" in faults(config, whole=True)[0]
    config = load_config(None, {"evaluation.held_out": [{"name": "aesthetic", "weights": str(own / "absent.pth")}]})
    assert faults(config) == [] and "absent.pth" in faults(config, whole=True)[0]
    config = load_config(None, {"evaluation.held_out": ["jpeg_compressibility", "own_trial:nan"]})
    [said] = faults(config)
    assert said.startswith("evaluation.held_out[1] (own_trial:nan): reward own_trial:nan failed on two made-up")


def test_try_first_leaves_the_trial_out(own):
    seen = []

    def reward(images, prompts):
        seen.append(list(prompts))
        return images.mean((1, 2, 3))

    config = load_config(None, {"prompts.path": ["a red circle"], "evaluation.prompts": None})
    assert faults(config, reward) == [] and seen == [["a red circle"] * 2]  # one prompt is enough


def test_metadata_reaches_a_reward_that_names_it_and_a_missing_column_is_named():
    images = torch.zeros(2, 3, 4, 4)

    def plain(images, prompts):
        return torch.ones(len(images))

    class Module(torch.nn.Module):
        def forward(self, images, prompts, metadata):
            return torch.tensor([float(row["count"]) for row in metadata])

    rows = [{"count": 3}, {"count": "4"}]
    assert contract.call(plain, images, ["a", "b"], rows).tolist() == [1, 1]
    assert contract.call(Module(), images, ["a", "b"], rows).tolist() == [3, 4]
    with pytest.raises(KeyError, match="no column 'count'; it has none"):
        contract.call(Module(), images, ["a", "b"])
    with pytest.raises(KeyError, match="no column 'count'; it has total, tag"):
        contract.call(Module(), images, ["a"], [{"total": 3, "tag": "x"}])
    needing = registry.UserReward("mine", Module())
    needing.columns = ("count",)
    with pytest.raises(BadReward, match=r"'count', which 1 of 2 prompts do not have, the first 'b'.*: count, tag"):
        try_reward(needing, ["a", "b"], [{"count": 1}, {"tag": 2}], 8, "cpu")


def test_a_scorer_hands_each_image_its_row_and_keeps_to_what_the_reward_says():
    seen, sizes = [], []

    class Counted:
        name, differentiable, batch = "counted", False, 2

        def __call__(self, images, prompts, metadata):
            seen.extend(zip(prompts, (row["count"] for row in metadata), strict=True))
            sizes.append(len(images))
            return images.mean((1, 2, 3))

    work = clean()
    work = replace(work, chunk=replace(work.chunk, metadata=({"count": 1}, {"count": 2})))
    scores = scorer(Counted()).score(work)
    assert seen == [("first", 1)] * 3 + [("second", 2)] * 2 and max(sizes) == 2
    np.testing.assert_array_equal(scores.rewards, scorer().score(clean()).rewards)
    Counted.range = (0.0, 0.45)  # the last is .5
    bad = scorer(Counted(), quarantine=True).score(work).bad
    assert list(bad) == [1] and "outside of its range, 0 to 0.45" in bad[1]


def test_a_range_also_holds_for_scores_that_are_no_tensor_yet():
    def reward(images, prompts):
        return [0.5, 1.5][: len(images)]

    reward.range = (0, 1)
    user = registry.UserReward("mine", reward)
    assert contract.call(user, torch.zeros(1, 3, 4, 4), ["a"]).tolist() == [0.5]
    with pytest.raises(ValueError, match=r"it returned 1\.5, outside of its range, 0 to 1"):
        contract.call(user, torch.zeros(2, 3, 4, 4), ["a", "b"])


def test_quarantine_is_advised_for_data_and_not_for_a_defect():
    def failing(error):
        def reward(images, prompts):
            raise error

        return registry.UserReward("failing", reward)

    for error in (ValueError("odd"), KeyError("x"), NameError("x"), TypeError("x")):
        with pytest.raises(BadReward) as caught:
            scorer(failing(error)).score(clean())
        assert ("on_bad_reward=quarantine" in str(caught.value)) == isinstance(error, ValueError | KeyError)


def test_the_example_of_the_page_is_a_sound_reward(tmp_path, monkeypatch):
    page = (ROOT / "docs/rewards.md").read_text()
    [code] = re.findall(r"```python\n(# my_reward\.py, in the current directory or on.*?)```", page, re.DOTALL)
    (tmp_path / "own_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    reward = registry.load("own_page:Closeness", sharpness=2)
    try_reward(reward, ["a", "b"], [{"target": "0.5"}, {"target": "1"}], 16, "cpu")
    assert contract.told(reward, "batch") == 8 and contract.told(reward, "image_only")


def test_a_reward_of_images_alone_is_refused_inner_states_where_it_was_not_tried(own):
    work = clean()
    with pytest.raises(BadReward, match="judges finished pictures alone, and the objective asks it"):
        scorer(registry.load("own_trial:dear")).score(work)
    at_end = work.step == work.num_steps
    ends = replace(work, latents=work.latents[at_end], row=work.row[at_end], step=work.step[at_end])
    assert np.isfinite(scorer(registry.load("own_trial:dear")).score(ends).rewards[:, -1]).all()
