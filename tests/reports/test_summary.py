"""The last lines of a run: true to its records, in words that need no other page."""

import io
import json
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from made_up_run import COLLAPSE, save_evaluation

from learner import controller
from learner.config import load_config
from learner.run import main, say
from records.run_folder import BEFORE, Records
from records.storage import Storage
from reports import html, summary
from reports.views import RunViews


def said_of(copied, *settings) -> list[str]:
    """What a run says at its end, made-up figures and all, without its pictures and report."""
    records, config = Records.open(Storage(str(copied))), load_config(overrides=["evaluation.images=16", *settings])
    return [*summary.describe(records, config), *summary.next_commands(records, config)]


def finish(copied) -> list[str]:
    records, lines = Records.open(Storage(str(copied))), []
    controller.finish(records, RunViews(records, load_config(), lines.append))
    return lines


def test_a_gain_is_said_with_its_interval_and_what_it_means_and_collapse_is_the_loudest_line(copied):
    lines, records = said_of(copied), Records.open(Storage(str(copied)))
    assert f"SIGNS OF COLLAPSE after epoch 12: {COLLAPSE}. Look at the pictures before you use this LoRA" in lines
    assert not any("no sign of collapse" in line for line in lines)
    records.keep([{**line, "collapse": None} for line in records.lines])
    lines = said_of(copied, "objective.beta=30", "objective.kind=dag_db")
    goal = "trained: towards pictures that shapes_alignment scores higher; 12 epochs of 64 pictures"
    assert lines[0].startswith(goal) and "dag_db: target proportional to exp(30 x D x reward)" in lines[0]
    (reward,) = [line for line in lines if line.startswith("evaluated reward ")]
    assert "on 19 fixed images (1 bad ones left out): +0." in reward and "95 % interval +0." in reward
    assert reward.endswith("it rose by more than chance")
    assert "diversity among a prompt's pictures: 0.3 -> 0.3, 100% of what it was" in lines
    assert "no sign of collapse in 3 evaluations" in lines and len(lines) <= 12


@pytest.mark.parametrize(
    ("change", "words", "on_the_page"),
    [(-0.2, "it FELL by more than chance", "the reward fell"), (0.0, "this may be chance", "no change that can")],
)
def test_no_gain_is_said_as_plainly(copied, change, words, on_the_page):
    before = np.random.default_rng(1).normal(0.5, 0.05, 20)
    moved = before + change + np.random.default_rng(2).permutation(np.repeat([-0.02, 0.02], 10))
    save_evaluation(copied, BEFORE, list(before))
    save_evaluation(copied, 11, list(moved))
    (reward,) = [line for line in said_of(copied) if line.startswith("evaluated reward ")]
    assert words in reward and "rose" not in reward
    page = html.render(Records.open(Storage(str(copied))), load_config()).decode()
    assert on_the_page in page and "the reward rose" not in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([-2e-4, -4e-4] * 10, "-0.0003, 95 % interval -0.0003 to -0.0003: it FELL by more than chance"),
        ([5e-3, -1e-3] * 10, "+0.0020, 95 % interval +0.0006 to +0.0034: it rose by more than chance"),
        ([0.3, 0.1] * 10, "+0.200, 95 % interval +0.152 to +0.248: it rose by more than chance"),
        ([0.0] * 20, "0.000, 95 % interval 0.000 to 0.000: this may be chance, the interval holds 0"),
    ],
)
def test_a_change_beyond_chance_never_reads_as_0(copied, changes, said):
    save_evaluation(copied, BEFORE, [0.5] * 20)
    save_evaluation(copied, 11, [0.5 + change for change in changes])
    for name in ("epoch-before", "epoch-000011"):
        file = copied / f"evaluation/{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"prompt": ["one"] * 20}))
    (reward,) = [line for line in said_of(copied) if line.startswith("evaluated reward ")]
    assert reward.endswith(said)


def test_one_picture_proves_nothing_and_one_epoch_is_no_epochs(copied):
    for epoch, reward in ((BEFORE, 0.5), (3, 0.6), (7, 0.6), (11, 0.7)):
        save_evaluation(copied, epoch, [reward])
    records = Records.open(Storage(str(copied)))
    records.keep([line for line in records.lines if line["epoch"] < 1])
    first, *lines = said_of(copied)
    assert "; 1 epoch of 64 pictures; " in first
    (reward,) = [line for line in lines if line.startswith("evaluated reward ")]
    assert reward.endswith("on 1 fixed image: +0.200: too few images to tell it from chance")
    assert "too few pictures for an interval" in html.render(records, load_config()).decode()


def test_diversity_that_is_not_known_is_not_said_to_be(copied):
    records = Records.open(Storage(str(copied)))
    records.keep([{**line, "eval_distance": None, "collapse": None} for line in records.lines])
    lines = said_of(copied)
    (diversity,) = [line for line in lines if line.startswith("diversity among a prompt's pictures: ")]
    assert "not known, no prompt has two good pictures" in diversity
    assert "no sign of collapse in 3 evaluations, by the reward alone: diversity was not measured" in lines


def test_the_parts_of_an_epochs_line_add_up(copied):
    records, lines = Records.open(Storage(str(copied))), []
    views = RunViews(records, load_config(overrides=["run.runner=ray"]), lines.append)
    views.epoch_closed(records.lines[4] | {"evaluate_seconds": 1.5}, 12.0)
    assert "12.0 s (sample 2.0, score 1.0, train 4.0, evaluate 1.5, rest 3.5)" in lines[-1]


def test_without_an_evaluation_nothing_is_claimed_and_the_way_to_one_is_told(copied):
    for file in copied.glob("evaluation/epoch-*"):
        file.unlink()
    lines = said_of(copied, "evaluation.images=0")
    assert lines[1].startswith("not judged (evaluation.images=0): whether the reward rose is not known")
    assert not any("chance" in line or "pictures: " in line for line in lines)
    wide = said_of(copied, "evaluation.images=0", "sampler.chunk_size=24", "train.trajectories=96")
    # Evaluation refuses 0, and any that are not whole chunks.
    for told, command, images in ((lines, "evaluate", 128), (wide, "evaluate", 144), (wide, "compare", 144)):
        (line,) = [line for line in told if f"learner.{command}" in line and line.startswith("  ")]
        assert f"--images {images}" in line


def test_what_rewards_not_trained_on_say_and_a_control_and_bad_images_are_called_so(copied):
    sides = {BEFORE: ([0, 1, 0, None], [5, 5, 5, 5]), 11: ([1, 1, 0, 0], [4, 4, 4, 6])}
    for epoch, (accuracy, other) in sides.items():
        save_evaluation(copied, epoch, [0.5] * 4, {"shapes_accuracy": accuracy, "other": other})
    lines = said_of(copied)
    assert "pictures that show exactly what their prompt says: 33% -> 67%" in lines  # the bad one is left out
    assert "other, not trained on: 5.000 -> 4.500" in lines
    for epoch in (BEFORE, 3, 7, 11):
        save_evaluation(copied, epoch, [None] * 20)
    lines = said_of(copied, "train.shuffle_rewards=true")
    assert lines[0].startswith("trained: nothing to learn from, as rewards were")
    assert lines[1].startswith("not judged (too few evaluations, or only bad images)")


def test_the_end_has_the_report_and_commands_that_a_shell_takes(copied):
    lines, records = finish(copied), Records.open(Storage(str(copied)))
    assert f"report: {copied}/report.html" in lines and (copied / "report.html").is_file()
    commands = [shlex.split(line, comments=True) for line in lines[lines.index("next:") + 1 :]]
    assert [command[2] for command in commands] == ["learner.evaluate", "learner.generate", "learner.compare"]
    assert all(command[1] == "-m" and str(copied) in command for command in commands)  # with a blank in its name
    assert commands[1][-2:] == ["--prompt", records.evaluation(11)["prompt"][0]]
    here = summary.next_commands(records, load_config(overrides=["reward.name=__main__:mine"]))  # learner.train's
    assert [line.split()[2] for line in here[1:-1]] == ["learner.generate"]
    assert "cannot import this run's reward: put the function into a file" in here[-1]
    where = subprocess.run([commands[0][0], "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True)
    assert where.stdout.strip() == sys.prefix  # this very environment


def test_without_an_activated_environment_the_commands_name_its_python(copied, monkeypatch, tmp_path):
    other = tmp_path / "elsewhere/python"
    other.parent.mkdir()
    other.symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(other.parent))
    monkeypatch.chdir(tmp_path)
    assert summary.interpreter() == shlex.quote(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert summary.interpreter() == ".venv/bin/python"  # after `make demo`
    assert any(line.startswith("  .venv/bin/python -m learner.evaluate ") for line in said_of(copied))


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    say("draw \u8d64 caf\u00e9")
    assert out.buffer.getvalue() == b"draw \\u8d64 caf\xe9\n"


def test_a_real_run_ends_in_these_words(finished_run, small_settings, tmp_path, capsys):
    folder = shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    settings = ["run.runner=inprocess", "lora.alpha=3", "evaluation.seed=5", f"run.dir={folder}"]
    assert main([*small_settings, *settings]) == 0  # nothing is left to do: the words are from the records
    said = capsys.readouterr().out.splitlines()
    end = said[next(i for i, line in enumerate(said) if line.startswith("trained: ")) :]
    assert (
        "2 epochs of 8 pictures" in end[0] and "exp(30720 x reward)" in end[0]
    )  # as at the start and end[1].startswith("evaluated reward ") and end[-4] == "next:"
    assert f"pictures: {folder}/before.png, {folder}/after.png" in end and len(end) <= 13
