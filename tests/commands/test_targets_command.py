"""`learner.targets` on small real runs, in process."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from commands.targets import main
from learner import run as learner_run
from learner.config import load_config
from records.run_folder import Records
from records.storage import Storage
from reports import html, summary, targets

SMALL = ("run.runner=inprocess",)
LORA = "checkpoints/latest/lora/pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def judge(run, cache, tmp_path):
    (tmp_path / "two.txt").write_text("a red circle\na blue square\n")
    given = ["--images", "16", "--cache", str(cache), "--prompts", str(tmp_path / "two.txt"), *SMALL]

    def go(*more, source=run) -> int:
        return main([str(source), *given, *map(str, more)])

    return go


def figures_of(folder: Path) -> dict:
    (file,) = folder.glob("targets-*.json")
    return json.loads(file.read_text())


def test_a_run_is_judged_against_a_chosen_tilt(run, judge, capsys, monkeypatch):
    assert judge("--beta", 2) == 0
    said, found = capsys.readouterr(), figures_of(run / "evaluation")
    assert found["beta"] == 2 and found["own_beta"] is None and found["base_pictures"] == 32
    assert [law["name"] for law in found["attributes"]][:2] == ["colour", "shape"] and len(found["attributes"]) == 7
    for law in found["attributes"]:
        for key in ("base", "target", "tuned"):
            assert sum(law[key]) == pytest.approx(1) and len(law[key]) == len(law["values"])
        assert 0 <= law["tv"]["low"] <= law["tv"]["high"] <= 1 and law["tv"]["floor"] <= law["tv"]["floor_high"]
        assert (law["drift"] is None) == (law["name"] == found["given"])
    assert "beta 2 is too large for 32 base pictures" in said.err  # there are not even 50
    assert "p_ref x exp(2 x shapes_alignment)" in said.out and "to the target, law of" in said.out
    (picture,) = (run / "evaluation").glob("targets-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    # The report, made anew, and the last words have it.
    page = (run / "report.html").read_text()
    assert 'id="target"' in page and "place_x" in page and "too large for 32 base pictures" in page
    records = Records.open(Storage(str(run)))
    lines = summary.describe(records, load_config(run / "config.yaml"))
    assert any(line.startswith("against the exact target (beta 2)") for line in lines)
    # Another tilt is another judgement, of the same pictures.
    assert judge("--beta", 3, "--given", "shape") == 0
    assert len(list((run / "evaluation").glob("targets-*.json"))) == 2
    # Damage is a warning.
    for file in (run / "evaluation").glob("targets-*.json"):
        file.write_text(file.read_text().replace('"beta"', '"peta"'))
    warned: list[str] = []
    records = Records.open(Storage(str(run)), warned.append)
    assert 'id="target"' not in html.render(records, load_config(run / "config.yaml")).decode()
    assert warned and "targets-step" in warned[0]


def test_a_lora_file_is_judged_too(run, judge, tmp_path):
    assert judge("--beta", 2, "--out", tmp_path / "out", source=run / LORA) == 0
    (file,) = (tmp_path / "out").glob("targets-pytorch_lora_weights-16-images-*.json")
    assert json.loads(file.read_text())["beta"] == 2


def test_what_cannot_be_judged_is_refused_before_anything_starts(run, refused, tmp_path):
    said = refused("targets", run, *SMALL)
    assert "dag_db has no target p_ref x exp(beta x reward); --beta B judges it against" in said
    assert "expected a number above 0" in refused("targets", run, *SMALL, "--beta", "0")
    assert "--attribute: 'animal'" in refused("targets", run, *SMALL, "--beta", "1", "--attribute", "animal")
    assert "--given: no attribute 'mood'; there are colour," in refused("targets", run, *SMALL, "--given", "mood")
    clip = f"evaluation.clip={tmp_path / 'nowhere'}"
    assert "evaluation.clip" in refused("targets", run, *SMALL, clip, "--beta", "1", "--attribute", "a=b,c")
    assert "16 pictures of 16 prompts" in refused("targets", run, *SMALL, "--beta", "1", "--images", "16")
    (tmp_path / "prompts.txt").write_text("a photo of a dog\n")
    other = ("--prompts", tmp_path / "prompts.txt", "reward.name=jpeg_compressibility")
    assert "--attribute 'animal=a cat,a dog'" in refused("targets", run, *SMALL, "--beta", "1", *other)


@pytest.fixture(scope="module")
def residual_run(tmp_path_factory, small_settings):
    """Of an objective with a target: two epochs, evaluated after each."""
    folder = tmp_path_factory.mktemp("residual") / "run"
    settings = ["objective.kind=rtb", "objective.beta=2", "evaluation.every=1", "evaluation.images=16"]
    settings += ["flow.warmup_steps=0", "flow.fit_steps=0", "run.runner=inprocess", f"run.dir={folder}"]
    settings += ["prompts.path=[a red circle, a blue square]", "learner.learning_rate=1e-3"]
    assert learner_run.main([*small_settings, *settings]) == 0
    return folder


def test_a_run_with_a_target_has_its_certificate_at_every_evaluation(residual_run):
    lines = [json.loads(line) for line in (residual_run / "metrics.jsonl").read_text().splitlines()]
    before, *after = lines
    assert before["eval_gap"] == before["eval_base_gap"] and before["eval_nats"] == 0
    for line in after:
        assert line["eval_gap_low"] <= line["eval_gap"] <= line["eval_gap_high"] and line["eval_nats"] > 0
        assert line["eval_base_gap"] == before["eval_gap"] and line["eval_no_gap"] is None
        assert sum(line["eval_nats_by_transition"]) == pytest.approx(line["eval_nats"], rel=1e-5)
        assert len(line["eval_nats_by_transition"]) == 4
    rows = pq.read_table(residual_run / "evaluation/epoch-000001.parquet").to_pylist()
    path = [sum(row["kl"]) for row in rows]
    assert np.mean(path) == pytest.approx(after[-1]["eval_nats"], rel=1e-5)
    assert all(np.isfinite(row["log_ratio"]) for row in rows)
    page = (residual_run / "report.html").read_text()
    assert all(words in page for words in ("Gap to the target", "Nats by transition", "What the nats bought"))
    records = Records.open(Storage(str(residual_run)))
    said = summary.describe(records, load_config(residual_run / "config.yaml"))
    assert any(line.startswith("gap to the target: ") and "95 % interval" in line for line in said)


def test_evaluations_of_older_runs_are_still_read(residual_run, tmp_path):
    """They lack the columns."""
    copy = Path(shutil.copytree(residual_run, tmp_path / "old", symlinks=True))
    for file in (copy / "evaluation").glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.drop_columns(["kl", "log_ratio"]), file)
    from evaluation.image_sets import read_images

    seen = read_images(*Records.open(Storage(str(copy))).images(1))
    assert seen.kl is None and seen.log_ratio is None and len(seen.rewards) == 16


def test_learner_evaluate_has_the_certificate(residual_run, cache, tmp_path, capsys):
    from commands.evaluate import main as evaluate

    run = Path(shutil.copytree(residual_run, tmp_path / "run", symlinks=True))
    assert evaluate([str(run), "--cache", str(cache), *SMALL]) == 0
    (file,) = (run / "evaluation").glob("step-*.json")
    found, said = json.loads(file.read_text()), capsys.readouterr().out
    assert found["certificate"]["exponent"] == 2 and len(found["certificate"]["nats_by_transition"]) == 4
    assert found["gap"]["low"] <= found["gap"]["value"] <= found["gap"]["high"] and found["gap"]["base"] >= 0
    assert "Gap to the target" in said and "distance from the base model" in said
    assert targets.newest(Records.open(Storage(str(run)))) is None
    # With its own exponent; 16 pictures are not enough, and it is said.
    assert main([str(run), "--images", "16", "--cache", str(cache), *SMALL]) == 0
    assert figures_of(run / "evaluation")["own_beta"] == figures_of(run / "evaluation")["beta"] == 2
