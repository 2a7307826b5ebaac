"""The comparison of objectives: its draws and choices, its table and picture from made-up figures, and (long) a small
one for real."""

import argparse
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import objectives
from benchmarks.objectives import BETA, GRIDS, Comparison, frontier, main, maximises, passes, score, told, trials
from benchmarks.objectives_shown import COLUMNS, figures, pareto, row, table
from evaluation import tilts
from learner.config import load_config

BUDGET = argparse.Namespace(budget=4096, overrides=[])


def test_every_point_of_every_grid_is_a_valid_config():
    for kind, (_, grid) in GRIDS.items():
        for values in itertools.product(*grid.values()):
            config = load_config({}, told(kind, dict(zip(grid, values, strict=True)), BUDGET))
            assert config.objective.kind == kind and config.objective.beta == BETA
            assert config.train.epochs * config.train.trajectories == BUDGET.budget
            # Of the same law of base pictures, and with all its checkpoints where one is searched for.
            assert (config.sampler.noise, config.sampler.adapter) == ("window", "window")
            assert (config.run.keep_checkpoints == 0) == maximises(kind)


def test_every_objective_has_as_many_different_trials_the_same_at_every_call():
    for kind in GRIDS:
        drawn = trials(kind, 4)
        assert len(drawn) == 4 and len({str(point) for point in drawn}) == 4
        assert drawn == trials(kind, 4) and drawn[:2] == trials(kind, 2)
    assert trials("ddpo", 4) != trials("dag_kl", 4)  # of the same grid


def judged(kind="rtb", tv=0.2, reward=0.3, nats=0.1, **changes) -> dict:
    """A run's made-up figures: base -0.1, target 0.5."""
    law = {"name": "place_x", "tv": {"value": tv, "floor": 0.04}, "drift": None}
    drifts = [{"value": None, "floor": None}, {"value": 0.05, "floor": 0.03}, {"value": 0.06, "floor": 0.05}]
    rest = [{"name": f"other {i}", "tv": {"value": 0.9}, "drift": drift} for i, drift in enumerate(drifts)]
    target = {
        "reward": {"value": reward, "base": -0.1, "target": 0.5}, "distance": {"value": 0.02, "target": 0.04},
        "attributes": [*rest, law], "trajectories_trained": 4000, "seconds": 1800.0, "epochs_done": 64,
    }  # fmt: skip
    certificate = {"gap": 0.1, "nats": nats, "ideal_gain": 0.8}
    return {"kind": kind, "folder": f"{kind}-1", "target": target, "certificate": certificate, "flops": 2e15} | changes


FAILED = {"kind": "rtb", "folder": "rtb-2", "failed": "learner.run ended with status 1"}


def test_figures_are_ratios_to_the_target_and_rates_of_the_gain():
    assert figures(judged(), "place_x") == pytest.approx(
        {
            "tv": 0.2, "floor": 0.04, "gain": 0.4, "gap": 0.1, "nats": 0.1, "of_target": 2 / 3, "of_ideal": 0.5,
            "drift": 0.02, "distance": 0.5, "per_trajectory": 0.1, "per_flop": 0.2, "per_second": 0.8,
        }
    )  # fmt: skip


def made_up() -> list[dict]:
    unknown = judged(tv=0.5, certificate={"gap": None, "nats": None, "ideal_gain": None})
    unknown["target"] |= {"distance": None, "seconds": None}
    runs = {
        "dag_db": [unknown],
        "ddpo": [judged("ddpo", tv=0.3, reward=0.9, nats=3.0), judged("ddpo", tv=0.4, reward=1.1, nats=5.0)],
        "ddpo where it passes the target's reward": [judged("ddpo", tv=0.25), judged("ddpo") | FAILED],
        "rtb": [judged(tv=0.1), FAILED, judged(tv=0.2)],
        "rdb": [FAILED],
    }
    return [row(name, found, "place_x") for name, found in runs.items()]


def test_the_nearest_to_the_target_comes_first_and_what_failed_last():
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(made_up()).splitlines()]
    assert [cells[0] for cells in lines[2:]] == [
        "rtb", "ddpo where it passes the target's reward", "ddpo", "dag_db", "rdb",
    ]  # fmt: skip
    found = {cells[0]: dict(zip(("runs", *COLUMNS), cells[1:], strict=True)) for cells in lines[2:]}
    assert found["rtb"]["runs"] == "3 (1)" and found["rdb"]["runs"] == "1 (1)"
    assert set(found["rdb"].values()) == {"1 (1)", "-"}
    # Student's interval of two seeds, .1 and .2: 12.7 standard errors of .05 to either side.
    assert found["rtb"]["tv"] == "0.15 [-0.485, 0.785]" and found["dag_db"]["tv"] == "0.5"
    assert (found["dag_db"]["gap"], found["dag_db"]["distance"], found["dag_db"]["per_second"]) == ("-", "-", "-")
    assert found["ddpo"]["of_target"].startswith("1.83 [")


def test_the_picture_has_what_is_known_below_the_frontier():
    (ax,) = pareto(made_up(), [(0.0, 0.0), (1.0, 0.9)], (0.5, 0.6)).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.get_lines()}
    known = {"ddpo": 2, "ddpo where it passes the target's reward": 1, "rtb": 2}  # a mark for each seed
    assert {name: len(lines[name]) for name in lines if name in known} == known and len(lines) == len(known) + 2
    assert lines["ddpo"] == [pytest.approx([3.0, 1.0]), pytest.approx([5.0, 1.2])]
    assert lines["rtb"][0] == pytest.approx([0.1, 0.4])
    assert lines["the target"] == [[0.5, 0.6]] and lines["ideal tilts of the base model"][-1] == [1.0, 0.9]


def test_target_samplers_are_chosen_by_total_variation_and_maximisers_by_reward():
    near, high = judged(tv=0.1, reward=0.2), judged(tv=0.3, reward=0.9)
    assert min((FAILED, high, near), key=score) is near
    near, high = judged("ddpo", tv=0.1, reward=0.2), judged("ddpo", tv=0.3, reward=0.9)
    assert min((FAILED | {"kind": "ddpo"}, near, high), key=score) is high
    assert [kind for kind in GRIDS if maximises(kind)] == ["ddpo", "grpo"]


def test_the_checkpoint_that_passes_is_the_one_that_the_rollouts_came_from():
    rewards = [(-1, 0, None), (0, 2, -0.1), (1, 4, 0.3), (2, 6, 0.6), (3, 8, 0.5), (4, 10, 0.9)]
    lines = [dict(zip(("epoch", "step", "reward_mean"), line, strict=True)) for line in rewards]
    assert passes(lines, 0.5) == 4  # after the second epoch
    assert passes(lines, 0.9) == 8 and passes(lines, 1.0) is None


def test_a_maximiser_that_never_passes_is_a_failure(tmp_path):
    here = Comparison(argparse.Namespace(out=tmp_path))
    (tmp_path / "ddpo-1").mkdir()
    (tmp_path / "ddpo-1/metrics.jsonl").write_text('{"epoch": 0, "step": 2, "reward_mean": 0.1}\n')
    assert here.at_the_target(judged("ddpo"))["failed"] == "its reward never passes the target's"
    assert here.at_the_target(FAILED) is FAILED


def test_the_frontier_rises_and_the_target_is_on_it():
    rng = np.random.default_rng(0)
    rewards, groups = rng.normal(size=2000), np.arange(2000) % 2
    curve, (nats, gain) = frontier(rewards, groups)
    x, y = np.array(curve).T
    assert curve[0] == (0.0, pytest.approx(0)) and len(curve) > 20
    assert (np.diff(x) > 0).all() and (np.diff(y) > 0).all()
    assert gain == pytest.approx(BETA, abs=0.1) and nats == pytest.approx(BETA**2 / 2, abs=0.1)  # of a Gaussian
    assert x[-1] > nats and np.interp(nats, x, y) == pytest.approx(gain, rel=1e-3)
    assert tilts.ideal_gain(rewards, groups, nats) == pytest.approx(gain)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--trials", "7"], "from 1 to 6"),
        (["--budget", "32"], "train.epochs"),
        (["train.epoch=1"], "train.epoch: unknown key"),
        (["train"], "train: expected key=value"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_does(given, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(objectives, "compare", lambda args: pytest.fail("it runs"))
    with pytest.raises(SystemExit, match="2"):
        main([*given, "--out", str(tmp_path), "--only", "adjoint_matching", "ddpo"])
    assert said in capsys.readouterr().err


@pytest.mark.long
def test_two_objectives_for_real(tmp_path, capsys):
    main([
        "sampler.steps=5", "lora.rank=2", "lora.targets=attention", "--out", str(tmp_path), "--only", "ddpo",
        "adjoint_matching", "--trials", "1", "--seeds", "1", "--budget", "64", "--images", "16", "--workers", "1",
    ])  # fmt: skip
    text, found = (tmp_path / "results.md").read_text(), json.loads((tmp_path / "results.json").read_text())
    assert text in capsys.readouterr().out and len(json.loads((tmp_path / "trials.json").read_text())) == 2
    for kind in ("ddpo", "adjoint_matching"):
        (one,) = found["runs"][kind]
        assert one["target"]["trajectories_trained"] == 64 and one["target"]["beta"] == BETA and one["flops"] > 1e9
        assert one["target"]["reward_name"] == "shapes_preference" and one["certificate"]["nats"] > 0
    assert "ddpo-1: its reward never passes the target's" in found["failures"]  # of a single epoch
    with Image.open(tmp_path / "pareto.png") as picture:
        assert picture.width > 1000


@pytest.mark.long
def test_a_run_that_fails_is_in_the_table(tmp_path):
    main(["model.path=nowhere", "--out", str(tmp_path), "--only", "grpo", "--trials", "1", "--seeds", "1"])
    text = (tmp_path / "results.md").read_text()
    assert "| grpo | 1 (1) | -" in text and "grpo-1: learner.run ended with status 2: see grpo-1.log" in text
    assert "nowhere" in (tmp_path / "grpo-1.log").read_text()
