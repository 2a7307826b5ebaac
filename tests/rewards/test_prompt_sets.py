"""Lists that are here, and benchmarks read from a hub's cache that is made on the spot."""

import functools
import json

import pytest

from learner.config import load_config
from learner.prompts import training_prompts
from learner.run import main
from rewards import prompt_sets
from rewards.prompt_sets import PromptSetError

SETS = {"photo": ["a photo of a dog", "ein Foto, \u2028 zwei Zeilen"], "drawbench": ["a red car", "a red car"]}
SETS |= {"paintings": ["oil on canvas"], "anime": ["a duel"], "concept-art": ["a castle"]}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(dataset): its files lie in an otherwise empty cache, as the hub's client would have put them."""
    from huggingface_hub import hf_hub_download

    cache = tmp_path / "hub"
    # Its place is bound when the function is defined.
    monkeypatch.setattr("huggingface_hub.hf_hub_download", functools.partial(hf_hub_download, cache_dir=cache))

    def put(dataset: str) -> None:
        folder = cache / f"datasets--{dataset.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (benchmark := folder / "snapshots" / ("0" * 40) / "benchmark").mkdir(parents=True)
        for name, prompts in SETS.items():
            (benchmark / f"{name}.json").write_text(json.dumps(prompts))

    put.cache = cache
    return put


def test_the_lists_are_whole():
    animals, classes = prompt_sets.fetch("animals"), prompt_sets.fetch("imagenet_classes")
    assert len(animals) == len(set(animals)) == 45 and animals[-1] == "kangaroo"
    assert len(classes) == 1000 and len(set(classes)) == 999
    at = {0: "tench", 99: "goose", 207: "golden retriever", 517: "crane", 638: "maillot", 950: "orange"}
    assert {index: classes[index] for index in at} == at and classes[999] == "toilet tissue"
    assert all(name == name.strip() and name for name in animals + classes)


@pytest.mark.parametrize("dataset", prompt_sets.DATASETS)
def test_benchmarks_come_from_the_cache_without_a_network(hub, dataset):
    hub(dataset)
    for style in prompt_sets.STYLES:
        assert prompt_sets.fetch(f"hpdv2:{style}") == SETS[style]
    assert prompt_sets.fetch("drawbench") == SETS["drawbench"]  # in order, repeated ones too
    mixed = SETS["paintings"] + SETS["photo"]
    assert [prompt_sets.fetch("hpdv2:paintings+photo") for _ in range(3)] == [mixed] * 3
    assert training_prompts(load_config(overrides=["prompts.path=hpdv2:paintings+photo"]))[0] == "oil on canvas"


def test_without_network_and_cache_it_is_said_how_to_get_them(hub, capsys):
    expected = (
        r"hpdv2:photo\+anime is neither .*zhwang/HPDv2: \w+, ymhao/HPDv2: \w+.*hf download zhwang/HPDv2 "
        r"benchmark/photo\.json --repo-type dataset.*https://huggingface\.co/datasets/zhwang/HPDv2.*"
        r"prompts\.path=FOLDER/benchmark/photo\.json.*prompts\.path=YOUR_FILE"
    )
    with pytest.raises(PromptSetError, match=expected) as caught:
        prompt_sets.fetch("hpdv2:photo+anime")
    assert len(str(caught.value).splitlines()) == 1
    assert main(["prompts.path=drawbench", "reward.name=jpeg_compressibility"]) == 2
    assert "prompts.path: drawbench is neither" in capsys.readouterr().err


def test_other_names_are_refused_and_a_file_of_another_shape_is_named(hub):
    for name in ("hpdv2:", "hpdv2:photo+", "hpdv2:photo+photo", "hpdv2:drawbench", "animal", ""):
        with pytest.raises(PromptSetError, match=r"no prompt set; there are animals, .*hpdv2:photo\+paintings"):
            prompt_sets.fetch(name)
    hub("zhwang/HPDv2")
    for content in ("[", '{"a": 1}', "[]", '["a", null]', "[{}]"):
        next(hub.cache.rglob("anime.json")).write_text(content)
        with pytest.raises(PromptSetError, match=r"hpdv2:anime: .*anime\.json"):
            prompt_sets.fetch("hpdv2:anime")
