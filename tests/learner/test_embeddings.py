"""Prompts embedded once: what is kept, and that runs are the same without text encoders in their parts."""

import json
import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion import lora
from diffusion.base_model import BaseModel
from diffusion.open_model import open_base_model, open_text_encoders
from evaluation import calibration, settling
from evaluation.adapters import drawing
from evaluation.image_sets import ImageSet
from learner import build, embeddings
from learner.config import read_config
from learner.config.sections import LoraConfig
from learner.inprocess import InProcessPools
from learner.run import main

PROMPTS = ["a red circle", "", "a blue square on a white background"]
KINDS = ["tiny_pipeline", "tiny_sdxl", "tiny_sd3", "tiny_flux"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIBUTARY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def no_text_encoders(monkeypatch) -> None:
    def texts(self):
        raise AssertionError("the text encoders were opened")

    for kind in (BaseModel, *BaseModel.__subclasses__()):
        opened = cached_property(texts)
        opened.__set_name__(kind, "texts")
        monkeypatch.setattr(kind, "texts", opened)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_encoders_alone_are_the_models_own_and_serve_it(kind, request, monkeypatch):
    path = request.getfixturevalue(kind)
    own = open_base_model(path, text_tokens=16)
    rows = dict(zip(PROMPTS, open_text_encoders(path, text_tokens=16)(PROMPTS), strict=True))
    assert all(np.array_equal(rows[prompt], own.embed([prompt])[0].numpy()) for prompt in PROMPTS)
    assert len({row.tobytes() for row in rows.values()}) == len(PROMPTS)
    no_text_encoders(monkeypatch)
    given = open_base_model(path, text_tokens=16, embedded=rows)
    assert torch.equal(given.embed([*PROMPTS, *PROMPTS]), own.embed([*PROMPTS, *PROMPTS]))
    with pytest.raises(AssertionError, match="were opened"):
        given.embed(["a prompt that nobody has embedded"])


@pytest.fixture
def config(small_settings, tiny_sd3):
    def of(*overrides: str):
        config, faults = read_config(
            {}, [*small_settings, f"model.path={tiny_sd3}", "objective.last_transition=skip", *overrides]
        )
        assert not faults
        return config

    return of


def test_no_prompt_is_embedded_twice(config, folder, tmp_path):
    (tmp_path / "others.txt").write_text("an owl\na bee\n")
    asked = list[str]()

    def encode(prompts):
        asked.extend(prompts)
        return [np.full((2, 3), len(prompt), np.float32) for prompt in prompts]

    def rows(*overrides: str) -> dict[str, np.ndarray]:
        return dict(embeddings.embedded(config(*overrides), encode, lambda done, total: None))

    first = rows("prompts.path=[a fox,an owl]", f"evaluation.prompts={tmp_path / 'others.txt'}")
    assert sorted(asked) == sorted(first) == ["", "a bee", "a fox", "an owl"]
    again = rows("prompts.path=[a fox,an elk]")
    assert asked[4:] == ["an elk"] and np.array_equal(again["a fox"], first["a fox"])
    rows("prompts.path=[a fox]", "model.text_tokens=8")
    assert sorted(asked[5:]) == ["", "a fox"]  # other rows
    for file in folder.rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(rows("prompts.path=[a fox]")["a fox"], first["a fox"]) and sorted(asked[7:]) == ["", "a fox"]


def test_rows_are_of_the_pipeline_that_the_index_names(config, tiny_sd3, tmp_path):
    """Whether a T5 is read the index alone says."""
    key, copy = embeddings._key(config()), Path(shutil.copytree(tiny_sd3, tmp_path / "copy"))
    assert embeddings._key(config(f"model.path={copy}")) == key
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    assert embeddings._key(config(f"model.path={copy}")) != key


@pytest.mark.parametrize("rows", [np.zeros((2, 3)), np.zeros(3, np.float32), np.full((2, 3), np.nan, np.float32)])
def test_rows_that_cannot_be_are_made_again(config, folder, rows):
    good = np.ones((2, 3), np.float32)

    def made() -> list[np.ndarray]:
        found = embeddings.embedded(config("prompts.path=[a fox]"), lambda prompts: [good] * len(prompts), print)
        return [each for _, each in found]

    made()
    for file in folder.rglob("*.npy"):
        np.save(file, rows)
    assert all(np.array_equal(each, good) for each in made())


@pytest.mark.parametrize("what", ["calibration", "window", "evaluation"])
def test_pools_have_what_they_read_embedded(config, what, tiny_sd3, monkeypatch):
    """Nothing else, and so no text encoders of their own."""
    own = config("prompts.path=[a fox,an owl]", "sampler.kernel=calibrated", "objective.last_transition=train")
    if what == "calibration":
        wanted = calibration.pictures(own, ["a fox", "an owl"])
    elif what == "window":
        wanted = settling.continuations(own, ["a fox", "an owl"])
    else:
        drawn = drawing(own, ["a fox", "an owl"], own.evaluation, LoraConfig(rank=1, alpha=1))
        wanted = ImageSet(drawn, ("a fox", "an owl"), settling.continuations(own, ["a fox"]).snapshot)
    assert set(embeddings.prompts(wanted.config)) == {"", "a fox", "an owl"}
    monkeypatch.setattr(embeddings, "LARGE", 0)
    pools = InProcessPools(wanted.config)
    no_text_encoders(monkeypatch)
    pools.sampler.sample(wanted.chunks()[0], wanted.snapshot)


def test_a_cache_that_cannot_be_written_stops_nothing(config, folder):
    folder.write_text("a file where the folder would be")
    rows = embeddings.embedded(
        config("prompts.path=[a fox]"), lambda prompts: [np.zeros((1, 1), np.float32)] * len(prompts), print
    )
    assert sorted(dict(rows)) == ["", "a fox"]


def test_a_run_without_text_encoders_in_its_parts_is_the_same(small_settings, tiny_sd3, tmp_path, monkeypatch):
    settings = [*small_settings, f"model.path={tiny_sd3}", "objective.last_transition=skip", "run.runner=inprocess"]
    settings += ["evaluation.images=4"]
    files = []
    for large in (0, embeddings.LARGE):
        monkeypatch.setattr(embeddings, "LARGE", large)
        assert main([*settings, f"run.dir={tmp_path / str(large)}"]) == 0
        files.append((tmp_path / str(large) / "checkpoints/latest/lora" / lora.DIFFUSERS_FILE).read_bytes())
        monkeypatch.setattr(embeddings, "LARGE", 0)
    assert files[0] == files[1] and [*(tmp_path / "cache/embeddings").rglob("*.npy")]
    no_text_encoders(monkeypatch)  # all is known by now
    assert main([*settings, f"run.dir={tmp_path / 'known'}"]) == 0


def test_encoders_are_in_every_process_where_they_are_small(config):
    assert not embeddings.once(config())
    assert build.parts(config()).with_embedded({}).sampler.keywords == {"embedded": {}}
