"""`learner.evaluate` on a small real run, in process: figures, files, going on, and what it refuses."""

import importlib
import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import evaluate
from commands.evaluate import main
from evaluation.adapters import Target, find, split
from evaluation.image_sets import Cache, read_images
from evaluation.metrics import paired_interval
from learner.inprocess import InProcessPools
from records.run_folder import Records
from records.storage import Storage, StorageError
from reports import html, summary
from rewards import content

KEYS = {"reward", "vendi", "distance", "fid", "kid", "accuracy", "held_out", "absent"}
SMALL = ("run.runner=inprocess", "evaluation.held_out=[jpeg_incompressibility]")
LORA = "checkpoints/latest/lora/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def judge(run, cache):

    def go(*more, source=run, cache=cache) -> int:
        return main([str(source), "--images", "8", "--cache", str(cache), *SMALL, *map(str, more)])

    return go


def target_of(run, *more) -> Target:
    args = evaluate.parser("evaluate", "").parse_intermixed_args([str(run), *map(str, more), *SMALL])
    (target,) = find(*split(args.names), args, print)
    return target


def figures_of(run) -> dict:
    (file,) = (run / "evaluation").glob("step-*-8-images-*.json")
    return json.loads(file.read_text())


def test_a_run_is_judged(run, judge, cache, capsys):
    assert judge() == 0
    figures, said = figures_of(run), capsys.readouterr().out
    assert set(figures) >= KEYS and figures["epochs_done"] == 2 and figures["trajectories_trained"] == 16
    (checkpoint,) = (run / "checkpoints").glob("step-000002")
    assert figures["adapter_sha256"] == json.loads((checkpoint / "state.json").read_text())["adapter_sha256"]
    for figure in (figures[name] for name in KEYS - {"held_out", "distance", "absent"}):
        assert {"base", "floor"} <= set(figure) and figure["low"] <= figure["value"] <= figure["high"]
        assert figure["floor"] <= figure["floor_high"]
    # Eight pictures of eight prompts: their distance is not that within a prompt under the same name.
    assert figures["distance"] is None and list(figures["absent"]) == ["distance"]
    assert (
        "Distance within a prompt                -  no prompt has two good pictures (8 pictures of 8 prompts)" in said
    )
    assert figures["settings"]["images"] == 8 and figures["settings"]["seed"] == 5
    assert set(figures["held_out"]) == {"jpeg_incompressibility"}  # accuracy has a key of its own
    assert figures["fid"]["floor"] > 0 and figures["fid"]["base"] > 0
    assert "reward: shapes_alignment" in said and "noise alone" in said
    (table,) = (run / "evaluation").glob("step-000002-*.parquet")
    rows = pq.read_table(table).to_pylist()
    assert [row["number"] for row in rows] == list(range(8))
    assert figures["reward"]["value"] == pytest.approx(np.mean([row["reward"] for row in rows]), rel=1e-6)
    assert table.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    then = json.loads((run / "evaluation/epoch-000001.json").read_text())  # the run's own of the first four, at its end
    assert [row["prompt"] for row in rows[:4]] == then["prompt"]
    assert [row["reward"] for row in rows[:4]] == pytest.approx(then["reward"])
    # Base and tuned are paired by noise; the other set is not.
    sets = target_of(run, "--images", "8").sets().values()
    made = [Cache(cache).make(image_set, pytest.fail, lambda *_: None) for image_set in sets]
    tuned, base, other = (read_images(content).rewards for content in made)
    low, high = paired_interval(base, tuned, [row["prompt"] for row in rows])
    assert (figures["reward"]["gain_low"], figures["reward"]["gain_high"]) == pytest.approx((low, high))
    assert abs(base.mean() - other.mean()) < 2 * figures["reward"]["floor_high"]
    # Another number of pictures is another judgement, in files of its own; the report shows that of most.
    assert main([str(run), "--images", "4", "--cache", str(cache), *SMALL]) == 0 and figures_of(run) == figures
    (file,) = (run / "evaluation").glob("step-*-4-images-*.json")
    assert json.loads(file.read_text())["settings"]["images"] == 4
    without_seal = {key: value for key, value in figures.items() if key != "sha256"}
    assert summary.figures(Records.open(Storage(str(run))))[2] == without_seal


@pytest.mark.long
def test_the_runs_report_has_the_figures(run, judge, capsys, monkeypatch):
    words = "against itself, drawn with other seeds"
    assert words not in (run / "report.html").read_text()
    assert judge() == 0 and capsys.readouterr().err == "" and words in (run / "report.html").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(html, "render", Mock(side_effect=StorageError("no space left")))
        assert judge() == 0 and "no space left" in capsys.readouterr().err
    (run / "report.html").unlink()  # a run that drew none keeps none
    assert judge() == 0 and not (run / "report.html").exists()
    Records.open(Storage(str(run))).note(finished=False)  # it draws its own, perhaps at this moment
    (run / "report.html").write_text("the run's own")
    assert judge() == 0 and (run / "report.html").read_text() == "the run's own"


@pytest.mark.long
def test_a_stopped_judgement_goes_on_and_no_picture_is_made_twice(run, judge, tmp_path, monkeypatch, capsys):
    real, made = InProcessPools.judge, []

    def judge_some(self, snapshot, chunks, done):
        def stop(chunk, scores):
            done(chunk, scores)
            made.append(chunk.index)
            if len(made) == 3:
                raise KeyboardInterrupt

        real(self, snapshot, chunks, stop)

    with monkeypatch.context() as patched:
        patched.setattr(InProcessPools, "judge", judge_some)
        assert judge(cache=tmp_path / "cache") == 130
        assert "the same command goes on" in capsys.readouterr().err and not list((run / "evaluation").glob("step-*"))
        assert judge("--step", 2, cache=tmp_path / "cache") == 0 and made == [0, 1] * 3
        interrupted = figures_of(run)
        patched.setattr(InProcessPools, "__init__", lambda *_: pytest.fail("nothing is to be made"))
        assert judge(cache=tmp_path / "cache") == 0 and figures_of(run) == interrupted
    assert judge() == 0 and figures_of(run) == interrupted


@pytest.mark.long
def test_a_lora_of_its_own_is_judged_like_the_runs(run, judge, tmp_path):
    """By the settings of the run that it lies in, or of --config."""
    assert judge() == 0
    elsewhere = shutil.copytree(run / "checkpoints/latest/lora", tmp_path / "elsewhere")
    kohya, config = run / "checkpoints/latest/lora/kohya.safetensors", ("--config", run / "config.yaml")
    for i, (source, *more) in enumerate([(run / LORA,), (elsewhere, *config), (kohya,)]):
        assert judge("--out", tmp_path / f"{i}", *more, source=source) == 0
        (file,) = (tmp_path / f"{i}").glob("*.json")
        figures = json.loads(file.read_text())
        assert {name: figures[name] for name in KEYS} == {name: figures_of(run)[name] for name in KEYS}


def test_what_cannot_be_judged_is_refused_before_anything_starts_and_all_faults_at_once(run, tmp_path, refused, capsys):
    assert main([str(run), str(tmp_path / "nowhere"), "evaluation.features=clips", *SMALL]) == 2
    said = capsys.readouterr().err
    assert "nowhere: no such file or folder" in said and "evaluation.features" in said
    assert "7 is not a multiple of sampler.chunk_size 4" in refused("evaluate", run, "--images", 7, *SMALL)
    assert "evaluation.held_out[0] (beauty)" in refused("evaluate", run, *SMALL, "evaluation.held_out=[beauty]")
    (tmp_path / "pictures").mkdir()
    assert "pictures holds no LoRA" in refused("evaluate", tmp_path / "pictures")
    assert "name a run or a LoRA" in refused("evaluate", *SMALL)
    torn, other = tmp_path / "torn.safetensors", tmp_path / "other.safetensors"
    torn.write_bytes((run / LORA).read_bytes()[:-100])
    assert f"{torn} is no whole safetensors file" in refused("evaluate", torn, *SMALL)
    state, settings = load_file(run / LORA), ["--config", run / "config.yaml", *SMALL]
    inputs = {name: value for name, value in state.items() if "lora_down" in name}
    save_file(state | {name: torch.cat([value, value], 1) for name, value in inputs.items()}, other)
    assert "is a LoRA of another base model" in refused("evaluate", other, *settings)
    few = {name: value for name, value in state.items() if "to_q" in name}
    save_file(few, other)
    assert "adapts other modules than all attention projections" in refused("evaluate", other, *settings)
    file = run / "checkpoints/step-000002/lora/kohya.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert "is not what was written" in refused("evaluate", run, "--step", 2, *SMALL)


def test_a_base_models_own_adapter_has_the_floors_as_figures(run, judge, tmp_path):
    nothing, state = tmp_path / "nothing.safetensors", load_file(run / LORA)
    weights = {name: value for name, value in state.items() if not name.endswith(".alpha")}
    assert any(value.any() for value in weights.values())
    save_file(state | {name: torch.zeros_like(value) for name, value in weights.items()}, nothing)
    assert judge("--config", run / "config.yaml", "--out", tmp_path / "out", source=nothing) == 0
    (file,) = (tmp_path / "out").glob("nothing-8-images-*.json")
    figures = json.loads(file.read_text())
    assert all(figures[name]["value"] == figures[name]["base"] for name in ("fid", "kid"))
    assert figures["reward"]["gain"] == 0 and figures["vendi"]["value"] == figures["vendi"]["base"]


def test_the_cache_knows_a_model_that_was_changed_in_place(run, tmp_path, tiny_pipeline):
    copy = Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))
    target = target_of(run, "--base", copy)
    before = target.sets()["base"].key
    assert target.sets()["base"].key == before
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.touch()  # the same content
    assert target.sets()["base"].key == before
    bits, about = weights.read_bytes(), weights.stat()
    weights.write_bytes(bits[:-1] + bytes([bits[-1] ^ 1]))
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))  # of the same size and age
    assert target.sets()["base"].key != before


def test_the_cache_knows_a_rewards_code_and_files(tmp_path, monkeypatch):
    """What it imports of the user's own, files that its options name, and nothing else."""
    monkeypatch.syspath_prepend(tmp_path)
    mine, helper, table = (tmp_path / name for name in ("mine_26.py", "helper_26.py", "table.txt"))
    mine.write_text("from helper_26 import scale\ndef score(images, prompts): return images.mean() * scale()\n")
    helper.write_text("def scale(): return 1\n")
    table.write_text("0.5")
    (tmp_path / "beside.py").write_text("")
    importlib.import_module("mine_26")
    tree = {"name": "mine_26:score", "options": {"table": str(table)}}
    seen = [content.digest(tree)]
    (tmp_path / "beside.py").write_text("x = 1")
    assert content.digest([tree]) == seen[0]
    for file in (mine, helper, table):
        file.write_text(file.read_text() + "\n")
        seen.append(content.digest(tree))
    assert len(set(seen)) == 4
    assert content.digest({"name": "jpeg_compressibility"}) == content.digest(None)  # ours: in `program`
