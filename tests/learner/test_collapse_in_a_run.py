"""Signs of collapse in a run: said, recorded, and the end of it if that was asked for."""

import json

import pytest

from evaluation import collapse
from learner.run import main


@pytest.fixture
def signs(monkeypatch):
    """From the second epoch's evaluation on; counts those that were compared."""
    seen = []

    def found(before, now):
        seen.append((before, now))
        return ["diversity fell to 3%", "held-out other fell"] if len(seen) >= 2 else []

    monkeypatch.setattr(collapse, "signs", found)
    return seen


def lines(tmp_path) -> dict[int, dict]:
    return {line["epoch"]: line for line in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())}


@pytest.mark.long
def test_it_is_said_and_recorded_and_the_run_goes_on(small_settings, signs, tmp_path, capsys):
    settings = [
        *small_settings, "run.runner=inprocess", "evaluation.every=1", "evaluation.held_out=[jpeg_incompressibility]",
        "prompts.path=[a red circle on a white background, a blue star on a white background]", "flow.widths=[8,16]",
        f"run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main(settings) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "COLLAPSE?" in line]
    both = "diversity fell to 3%; held-out other fell"
    assert said.split()[1] == "2/2" and said.endswith(f"COLLAPSE? {both}")
    recorded = lines(tmp_path)
    assert [recorded[epoch].get("collapse") for epoch in (-1, 0, 1)] == [None, None, both]
    for line in recorded.values():
        assert line["eval_vendi"] >= 1 and line["eval_distance"] > 0
        assert "eval_reward_mean/jpeg_incompressibility" in line
    before, now = signs[-1]
    assert len(before.rewards) == len(now.rewards) == 4 and set(now.held_out) == {"jpeg_incompressibility"}


def test_asked_to_it_ends_there_in_good_order_and_goes_on_when_told(light, signs, tmp_path, capsys):
    settings = [*light, "evaluation.every=1", f"run.dir={tmp_path / 'run'}"]
    for words in (("stopped after epoch 2: diversity fell", "report: ", "LoRA: "), ("stopped before: diversity fell",)):
        assert main([*settings, "train.stop_on_collapse=true"]) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words) and sorted(lines(tmp_path)) == [-1, 0, 1]
    assert main(settings) == 0
    assert "going on from checkpoints/step-000004" in capsys.readouterr().out
    assert sorted(lines(tmp_path)) == [-1, 0, 1, 2]


def test_without_an_evaluation_before_training_there_is_nothing_to_compare(light, signs, tmp_path):
    assert main([*light, "evaluation.images=0", f"run.dir={tmp_path / 'run'}"]) == 0
    assert list(lines(tmp_path)) == [0, 1, 2]
    assert signs == [] and all("collapse" not in line for line in lines(tmp_path).values())
