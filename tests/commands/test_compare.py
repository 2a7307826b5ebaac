"""`learner.compare`: one table, two pictures, of adapters that were judged alike."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image

from commands import evaluate
from commands.compare import main, pareto, require_alike, table
from commands.evaluate import Judged
from evaluation.adapters import find, split
from learner.config import load_config
from learner.inprocess import InProcessPools
from learner.prompts import evaluation_prompts, prompts_digest, training_prompts
from records.run_folder import Records
from records.storage import Storage

SMALL = ("run.runner=inprocess", "--images", "8")


@pytest.fixture(scope="module")
def runs(finished_run, tmp_path_factory):
    """Two runs: `late` is the finished one, `early` the same after its first epoch."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("late", "early"):
        shutil.copytree(finished_run, folder / name, symlinks=True)
        Records.open(Storage(str(folder / name))).note(name=name)
    shutil.rmtree(folder / "early/checkpoints/step-000002")
    return folder


def test_a_table_and_two_pictures(runs, tmp_path, monkeypatch, capsys):
    made, real = [], InProcessPools.judge
    monkeypatch.setattr(InProcessPools, "judge", lambda *given: (made.append(len(given[2])), real(*given)))
    out = tmp_path / "out"
    places = ("--out", str(out), "--cache", str(tmp_path / "cache"))
    assert main([str(runs / "late"), str(runs / "early"), *SMALL, *places]) == 0
    said, text = capsys.readouterr().out, (out / "comparison.md").read_text()
    assert text in said
    tables = [line for line in text.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[:5]]
    assert {row[0] for row in rows} == {"early", "late", "base model"} and rows[-1][0] == "base model"
    assert head[:3] == ["adapter", "reward", "gain [95 %]"] and head[-1] == "CPU seconds"
    tree = json.loads((out / "comparison.json").read_text())
    figures = {each["name"]: each for each in tree["adapters"]}
    best = max(figures.values(), key=lambda each: each["reward"]["value"])
    assert rows[0][0] == best["name"] and rows[0][1] == f"{best['reward']['value']:.4g}"
    assert all(float(row[-1]) > 0 and row[-2] == {"early": "8", "late": "16"}[row[0]] for row in rows[:2])
    for column, name in (("accuracy", "accuracy"), ("Vendi", "vendi"), ("drift (fid)", "fid")):
        assert rows[-1][head.index(column)] == f"{best[name]['base']:.4g}"
    assert best["vendi"]["base"] != best["vendi"]["value"]
    for name in ("pareto.png", "sheet.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 300 and len(picture.convert("RGB").getcolors(1 << 20)) > 10
    assert made == [2] * 4 and figures["early"]["fid"]["floor"] == figures["late"]["fid"]["floor"]  # one base model's
    # Every two adapters, on the same noise: the difference of their gains, with an interval of its own.
    rewards = next(each for each in tree["differences"] if each["figure"] == "reward")
    assert (rewards["of"], rewards["than"]) == ("early", "late")
    gains = [figures[name]["reward"]["gain"] for name in ("early", "late")]
    assert rewards["difference"] == pytest.approx(gains[0] - gains[1], abs=1e-6)
    assert rewards["low"] <= rewards["difference"] <= rewards["high"]
    assert tree["comparisons"] == len(tree["differences"]) == 2 and "2 comparisons on the same prompts" in text
    assert "8 images of 8 prompts, noise seed 5" in text and "no distance: no prompt has two good pictures" in text
    assert main([str(runs / "early"), *SMALL, "--out", str(out / "comparison.md")]) == 2
    assert f"--out: {out}/comparison.md: {out}/comparison.md is a file" in capsys.readouterr().err
    # The same again is no loss, another in its place would be one.
    assert main([str(runs / "early"), str(runs / "late"), *SMALL, *places]) == 0
    before = (out / "comparison.md").read_bytes()
    assert main([str(runs / "late"), str(runs / "early"), *SMALL[:1], "--images", "4", *places]) == 2
    assert "holds another comparison: name another folder with --out" in capsys.readouterr().err
    assert (out / "comparison.md").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("sampler.guidance", "2.0", "sampler.guidance=2.0"), ("evaluation.seed", "9", "evaluation.seed=9"),
        ("reward.name", "jpeg_compressibility", "reward.name=jpeg_compressibility"),
        ("prompts.path", "configs/prompts/shapes_common.txt", "evaluation.prompts=configs/prompts/shapes_common.txt"),
    ],
)  # fmt: skip
def test_what_was_not_judged_alike_is_refused(key, value, remedy, runs, run, tmp_path, refused):
    section, leaf = key.split(".")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree[section][leaf] = yaml.safe_load(value)
    Records.open(Storage(str(run))).save_settings(yaml.safe_dump(tree).encode())
    config, records = load_config(run / "config.yaml"), Records.open(Storage(str(run)))
    records.note(prompts_sha256=prompts_digest([*training_prompts(config), *evaluation_prompts(config)]))
    said = refused("compare", runs / "late", run, *SMALL, "--out", tmp_path / "out")
    words = ("give --prompts FILE for all",) if section == "prompts" else (f"{key}: ", f"give {key}=... for all")
    assert all(word in said for word in words) and not (tmp_path / "out").exists()
    args = evaluate.parser("compare", "").parse_intermixed_args([str(runs / "late"), str(run), *SMALL, remedy])
    require_alike(find(*split(args.names), args, print))


def judged(name, reward, cost=True) -> Judged:
    figure = {"value": reward, "low": reward - 0.1, "high": reward + 0.1, "base": 0.5, "floor": 0.01}
    more = {"gain": reward - 0.5, "gain_low": reward - 0.6, "gain_high": reward - 0.4}
    target = SimpleNamespace(name=name, config=SimpleNamespace(reward=SimpleNamespace(name="beauty")))
    figures = {"reward": {**figure, **more}, "held_out": {}, "accuracy": None, "vendi": figure, "distance": figure,
               "fid": figure, "trajectories_trained": 100, "seconds": 10.0, "absent": {},
               "settings": {"images": 8, "prompts": 4, "seed": 0, "features": "pixels"}}  # fmt: skip
    return Judged(target, figures | ({"gpus": 8, "cpus": 64} if cost else {}), {})


def test_cost_is_counted_in_the_dearest_devices():
    text = table([judged("a", 0.6), judged("b", 0.8)])
    assert "GPU seconds" in text and text.splitlines()[2].startswith("| b |") and "| 80 |" in text
    assert table([judged("a", 0.6, cost=False)]).splitlines()[2].endswith("| 100 | - |")


def test_diversity_in_the_picture_is_that_within_a_prompt():
    """All pictures' Vendi score may rise while each prompt's come together: a collapsed run would win. The cost of one
    of the two is not known."""
    first, second = judged("a", 0.6), judged("b", 0.7, cost=False)
    drawn = pareto([first, second])
    assert Image.open(io.BytesIO(drawn)).format == "PNG"
    changed = {**first.figures["vendi"], "value": 9.0, "low": 8.0, "high": 10.0}
    first.figures["vendi"] = changed
    assert pareto([first, second]) == drawn
    first.figures["distance"] = changed
    assert pareto([first, second]) != drawn
    first.figures["distance"] = second.figures["distance"] = None  # no prompt with two pictures
    assert pareto([first, second]) != drawn
