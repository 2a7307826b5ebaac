"""The comparison of objectives: its table and picture from made-up figures, and (long) a small one for real."""

import json

import pytest
from PIL import Image

from benchmarks.objectives import PRESETS, main, pareto, table
from learner.objectives.by_name import OBJECTIVES


def figures(gain: float, distance: float, fid: float) -> dict:
    def figure(value: float, base: float) -> dict:
        return {"value": value, "low": value - 0.01, "high": value + 0.01, "base": base, "floor_high": 0.002}

    reward = {"gain": gain, "gain_low": gain - 0.01, "gain_high": gain + 0.01}
    return {
        "reward": figure(0.8 + gain, 0.8) | reward, "held_out": {"shapes_alignment_soft": figure(0.9, 0.85) | reward},
        "accuracy": figure(0.5, 0.4), "distance": figure(distance, 6.0), "fid": figure(fid, 0.01),
        "trajectories_trained": 1280, "seconds": 100.0,
    }  # fmt: skip


RESULTS = {
    "dag_db": [figures(0.01, 5.9, 0.02), figures(0.03, 5.7, 0.04)],
    "ddpo": [figures(0.05, 4.0, 0.3), figures(0.07, 4.2, 0.5)],
}


def test_the_best_mean_gain_comes_first_and_the_base_model_last():
    assert set(PRESETS) == set(OBJECTIVES)
    _, _, first, second, base = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table(RESULTS).splitlines()
    )
    assert (first[0], first[1]) == ("ddpo", "+0.060") and (second[0], second[1]) == ("dag_db", "+0.020")
    assert second[2] == "+0.010 [0.000, 0.020], +0.030 [0.020, 0.040]"
    assert second[3] == f"{0.02 / 1.28:+.4f}" and second[6:8] == ["5.8", "0.03"]
    assert base[0] == "base model: 0.800" and base[7] == "0.01 (itself)"


def test_a_distance_that_is_not_known_is_left_out():
    results = {kind: [{**one, "distance": None} for one in found] for kind, found in RESULTS.items()}
    assert "| - |" in table(results).splitlines()[2] and len(pareto(results).axes) == 2


def test_the_picture_has_a_point_a_seed_their_mean_and_the_base_model():
    for ax, name, means, base in zip(
        pareto(RESULTS).axes, ("distance", "fid"), ([5.8, 4.1], [0.03, 0.4]), (6.0, 0.01), strict=True
    ):
        lines = {line.get_label(): line for line in ax.get_lines()}
        for kind, mean in zip(RESULTS, means, strict=True):
            assert lines[kind].get_xdata()[0] == pytest.approx(mean)
        assert lines["base model"].get_xdata()[0] == base and lines["base model"].get_ydata()[0] == 0.8
        seeds = sorted(x for line in ax.get_lines() if len(line.get_xdata()) == 2 for x in line.get_xdata())
        assert seeds == sorted(run[name]["value"] for runs in RESULTS.values() for run in runs)


@pytest.mark.long
def test_two_objectives_for_real_and_a_second_time_for_nothing(tmp_path, capsys):
    arguments = [
        "train.epochs=1", "train.trajectories=32", "evaluation.images=16", "sampler.steps=5", "--out", str(tmp_path),
        "--seeds", "1", "--images", "16", "--only", "ddpo", "residual_nabla_db",
    ]  # fmt: skip
    main(arguments)
    text = (tmp_path / "results.md").read_text()
    results = list(json.loads((tmp_path / "results.json").read_text()).values())
    assert text in capsys.readouterr().out
    assert {run["trajectories_trained"] for runs in results for run in runs} == {32}
    assert all(runs[0]["held_out"]["shapes_alignment_soft"] for runs in results)
    with Image.open(tmp_path / "pareto.png") as picture:
        assert picture.width > 1000
    metrics = (tmp_path / "ddpo-1/metrics.jsonl").read_bytes()
    main(arguments)
    assert (tmp_path / "ddpo-1/metrics.jsonl").read_bytes() == metrics and (tmp_path / "results.md").read_text() == text


@pytest.mark.long
def test_a_run_that_fails_says_where_its_words_are(tmp_path):
    with pytest.raises(RuntimeError, match=r"ddpo, seed 1, ended with status 2: see .*ddpo-1\.log"):
        main(["train.epochs=none", "--out", str(tmp_path), "--seeds", "1", "--only", "ddpo"])
    assert "train.epochs" in (tmp_path / "ddpo-1.log").read_text()
