"""`learner.evaluate` on a small real run, in process: figures, files, going on, and what it refuses."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from commands import evaluate
from commands.evaluate import main
from diffusion import lora_files
from evaluation import image_sets
from evaluation.adapters import find, split
from evaluation.metrics import paired_interval
from learner.inprocess import InProcessPools
from records.run_folder import Records
from records.storage import Storage
from reports import html

KEYS = {"reward", "vendi", "vendi_per_prompt", "distance", "fid", "kid", "fid_per_prompt", "accuracy", "held_out"}
SMALL = ("run.runner=inprocess", "evaluation.held_out=[jpeg_incompressibility]")


@pytest.fixture
def run(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "run", symlinks=True))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of finished pictures, for all tests that do not watch them being made."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def judge(run, cache):
    """Judge the run, or `source`."""

    def go(*more, source=run, cache=cache) -> int:
        return main([str(source), "--images", "24", "--cache", str(cache), *SMALL, *map(str, more)])

    return go


def figures_of(run) -> dict:
    (file,) = (run / "evaluation").glob("step-*.json")
    return json.loads(file.read_text())


def test_a_run_is_judged(run, judge, capsys):
    assert judge() == 0
    figures, said = figures_of(run), capsys.readouterr().out
    assert set(figures) >= KEYS and figures["epochs_done"] == 2 and figures["trajectories_trained"] == 16
    (checkpoint,) = (run / "checkpoints").glob("step-000002")
    assert figures["adapter_sha256"] == json.loads((checkpoint / "state.json").read_text())["adapter_sha256"]
    for name in ("reward", "vendi", "fid", "kid", "accuracy"):
        figure = figures[name]
        assert {"value", "low", "high", "base", "floor"} <= set(figure)
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert set(figures["held_out"]) == {"jpeg_incompressibility"}  # accuracy has a key of its own
    assert figures["fid"]["floor"] == figures["fid"]["base"] > 0
    assert figures["vendi_per_prompt"] is None and figures["fid_per_prompt"] is None  # a picture or two a prompt
    assert "reward, shapes_alignment" in said and "noise alone" in said
    rows = pq.read_table(run / "evaluation/step-000002.parquet").to_pylist()
    assert [row["number"] for row in rows] == list(range(24))
    assert figures["reward"]["value"] == pytest.approx(np.mean([row["reward"] for row in rows]), rel=1e-6)
    assert (run / "evaluation/step-000002.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_the_runs_report_has_the_figures(run, judge, capsys, monkeypatch):
    before = (run / "report.html").read_text()
    assert judge() == 0 and capsys.readouterr().err == ""
    after = (run / "report.html").read_text()
    assert "against itself, drawn with other seeds" in after and "against itself, drawn with other seeds" not in before

    def broken(*_):
        raise ZeroDivisionError("no page")

    monkeypatch.setattr(html, "render", broken)
    assert judge() == 0
    assert "report.html is without these figures: ZeroDivisionError: no page" in capsys.readouterr().err
    (run / "report.html").unlink()  # a run that drew none keeps none
    assert judge() == 0 and not (run / "report.html").exists()


def test_the_report_is_of_the_run_as_it_is_when_the_judging_is_done(run):
    storage = Storage(str(run))
    before_the_judging = Records.open(storage)
    before_the_judging.lines[:] = before_the_judging.lines[:1]
    one = evaluate.Judged(SimpleNamespace(records=before_the_judging), {}, {})
    said = []
    evaluate.redraw([one], said.append)
    assert "<b>2 of 2</b>" in (run / "report.html").read_text() and not said

    Records.open(storage).note(finished=False)  # it draws its own, perhaps at this moment
    (run / "report.html").write_text("the run's own")
    evaluate.redraw([one], said.append)
    assert (run / "report.html").read_text() == "the run's own" and not said
    shutil.rmtree(run)
    evaluate.redraw([one], said.append)
    assert "is without these figures" in said[0]


@pytest.mark.long
def test_the_same_figures_every_time_and_from_the_cache_at_once(run, judge, tmp_path, monkeypatch):
    assert judge(cache=tmp_path / "one") == 0
    first = figures_of(run)
    assert judge() == 0
    assert figures_of(run) == first
    monkeypatch.setattr(InProcessPools, "__init__", lambda self, config: pytest.fail("nothing is to be made"))
    assert judge(cache=tmp_path / "one") == 0
    assert figures_of(run) == first


@pytest.mark.long
def test_base_and_tuned_are_paired_by_noise_and_the_other_set_is_not(run, judge, tmp_path):
    assert judge(cache=tmp_path / "cache") == 0
    sets = [pq.read_table(folder).to_pylist() for folder in sorted((tmp_path / "cache/evaluation").iterdir())]
    assert len(sets) == 3
    figures, mine = figures_of(run), pq.read_table(run / "evaluation/step-000002.parquet")["reward"].to_numpy()
    others = [np.array([row["reward"] for row in rows]) for rows in sets]
    bases = [one for one in others if not np.array_equal(one, mine)]
    assert len(bases) == 2
    base = next(one for one in bases if np.mean(one) == pytest.approx(figures["reward"]["base"], rel=1e-6))
    low, high = paired_interval(base.astype(np.float64), mine.astype(np.float64))
    assert (figures["reward"]["gain_low"], figures["reward"]["gain_high"]) == pytest.approx((low, high), abs=1e-6)
    assert figures["reward"]["floor"] == pytest.approx(abs(np.mean(bases[0]) - np.mean(bases[1])), abs=1e-6)


def test_the_training_runs_own_evaluation_is_the_same_pictures(run, tmp_path):
    """Same prompts, noise and adapter: judging again what the run judged at its end."""
    assert main([str(run), "--cache", str(tmp_path / "cache"), "run.runner=inprocess"]) == 0
    then = json.loads((run / "evaluation/epoch-000001.json").read_text())
    now = pq.read_table(run / "evaluation/step-000002.parquet")
    assert now["prompt"].to_pylist() == then["prompt"] and now["reward"].to_pylist() == pytest.approx(then["reward"])


@pytest.mark.long
def test_a_stopped_judgement_goes_on(run, judge, tmp_path, monkeypatch, capsys):
    real, made = InProcessPools.judge, []

    def judge_some(self, snapshot, chunks, done):
        def stop(chunk, scores):
            done(chunk, scores)
            made.append(chunk.index)
            if len(made) == 8:
                raise KeyboardInterrupt

        real(self, snapshot, chunks, stop)

    monkeypatch.setattr(InProcessPools, "judge", judge_some)
    assert judge(cache=tmp_path / "cache") == 130
    assert "the same command goes on" in capsys.readouterr().err and not list((run / "evaluation").glob("step-*"))
    monkeypatch.setattr(InProcessPools, "judge", lambda *given: (made.append("again"), real(*given))[1])
    assert judge("--step", 2, cache=tmp_path / "cache") == 0
    assert made[:8] == [0, 1, 2, 3, 4, 5, 0, 1]
    interrupted = figures_of(run)
    assert judge() == 0
    assert figures_of(run) == interrupted


@pytest.mark.long
def test_a_lora_of_its_own_is_judged_like_the_runs(run, judge, tmp_path):
    assert judge() == 0
    for source in (run / "checkpoints/latest/lora", run / "checkpoints/latest/lora/kohya.safetensors"):
        out = tmp_path / source.name
        assert judge("--config", run / "config.yaml", "--out", out, source=source) == 0
        (file,) = out.glob("*.json")
        figures = json.loads(file.read_text())
        for name in KEYS:
            assert figures[name] == figures_of(run)[name]


@pytest.mark.long
def test_two_runs_share_their_base_models_pictures(run, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(run, other, symlinks=True)
    made, real = [], InProcessPools.judge

    def count(self, snapshot, chunks, done):
        made.append((snapshot.sha256, len(chunks)))
        real(self, snapshot, chunks, done)

    monkeypatch.setattr(InProcessPools, "judge", count)
    assert main([str(run), str(other), "--images", "8", "--cache", str(tmp_path / "cache"), *SMALL]) == 0
    assert [chunks for _, chunks in made] == [2, 2, 2]  # the second run's are all there
    assert figures_of(run) == figures_of(other)


def refused(capsys, *arguments) -> str:
    assert main([*map(str, arguments)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    return said


def test_what_is_no_run_and_no_lora_is_refused(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for given in (tmp_path / "nowhere", tmp_path / "pictures"):
        assert f"learner.evaluate: {given}: no run is here" in refused(capsys, given)


def test_a_torn_lora_is_refused(run, tmp_path, capsys):
    file = run / "checkpoints/latest/lora/pytorch_lora_weights.safetensors"
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(file.read_bytes()[:-100])
    assert f"{torn} is no whole safetensors file" in refused(capsys, torn, *SMALL)


def test_a_lora_of_another_base_model_is_refused_before_anything_starts(run, tmp_path, capsys):
    file = run / "checkpoints/latest/lora/pytorch_lora_weights.safetensors"
    state = {name: torch.cat([value, value], 1) if ".down." in name or ".lora_A." in name else value
             for name, value in load_file(file).items()}  # fmt: skip
    other = tmp_path / "other.safetensors"
    save_file(state, other)
    settings = ["--config", run / "config.yaml", *SMALL]
    assert "is a LoRA of another base model" in refused(capsys, other, *settings)


def test_a_tampered_checkpoint_is_not_judged(run, capsys):
    file = run / "checkpoints/step-000002/lora/kohya.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert "is not what was written" in refused(capsys, run, "--step", 2, *SMALL)


def test_all_faults_are_said_at_once(run, tmp_path, capsys):
    arguments = [str(run), str(tmp_path / "nowhere"), "--images", "7", "evaluation.features=clips", *SMALL]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    for word in ("nowhere: no run is here", "evaluation.features", "images: 7 is not a multiple"):
        assert word in said or word == "images: 7 is not a multiple"  # said once the values are sound
    assert main([str(run), "--images", "7", *SMALL]) == 2
    assert "evaluation.images: 7 is not a multiple of sampler.chunk_size 4" in capsys.readouterr().err
    assert main([str(run), *SMALL, "evaluation.held_out=[beauty]"]) == 2
    assert "evaluation.held_out[0] (beauty)" in capsys.readouterr().err
    assert main([*SMALL]) == 2
    assert "name a run or a LoRA" in capsys.readouterr().err


def test_a_base_models_own_adapter_has_the_floors_as_figures(run, judge, tmp_path):
    """An adapter of zeros: its pictures are the base model's."""
    lora, nothing = run / "checkpoints/latest/lora/pytorch_lora_weights.safetensors", tmp_path / "nothing.safetensors"
    assert lora_files.read(lora).flat.any()
    with safe_open(str(lora), "pt") as opened:
        metadata = opened.metadata()
    save_file({name: torch.zeros_like(value) for name, value in load_file(lora).items()}, nothing, metadata=metadata)
    assert judge("--config", run / "config.yaml", "--out", tmp_path / "out", source=nothing) == 0
    figures = json.loads((tmp_path / "out/nothing.json").read_text())
    for name in ("fid", "kid"):
        assert figures[name]["value"] == figures[name]["floor"]
    assert figures["reward"]["gain"] == 0 and figures["vendi"]["value"] == figures["vendi"]["base"]


def test_the_cache_knows_a_model_that_was_changed_in_place(run, tmp_path, tiny_pipeline):
    copy = tmp_path / "model"
    shutil.copytree(tiny_pipeline, copy)
    args = evaluate.parser("evaluate", "").parse_intermixed_args([str(run), "--base", str(copy), *SMALL])
    (target,) = find(*split(args.names), args)
    before = target.sets()["base"].key
    assert target.sets()["base"].key == before and isinstance(target.sets()["base"], image_sets.ImageSet)
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b"")
    Path(weights).touch()
    assert target.sets()["base"].key != before
