"""The last lines of a run: true to its records, in words that need no other page."""

import io
import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
from made_up_run import COLLAPSE, made_up_run, save_evaluation

from diffusion.trajectory import Chunk, Scores
from evaluation.fixed_images import images_table
from learner import controller
from learner.config import load_config
from learner.run import main, say
from models.shapes import world
from records.run_folder import BEFORE, Records
from records.storage import Storage
from reports import summary
from reports.views import RunViews

RED, BLUE = "a red circle on a white background", "a blue square on a black background"


@pytest.fixture
def folder(tmp_path):
    return made_up_run(tmp_path / "a run", settings=("run.runner=inprocess",))


def said(folder, *settings) -> list[str]:
    """What a run says at its end, made-up figures and all."""
    records, lines = Records.open(Storage(str(folder))), []
    config = load_config(overrides=["evaluation.images=16", *settings])
    controller.finish(records, RunViews(records, config, lines.append))
    return lines


def forget_collapse(folder) -> None:
    records = Records.open(Storage(str(folder)))
    records.keep([{**line, "collapse": None} for line in records.lines])


def save_pictures(folder, epoch, prompts, held_out=None, side=64, bad=None) -> None:
    """Fixed images as a run records them: true drawings of `prompts`."""
    rng, asked = np.random.default_rng(0), (RED, BLUE)
    images = np.stack([world.draw(world.parse(prompt), rng) for prompt in prompts])
    count = len(prompts)
    kept = {} if held_out is None else {"shapes_accuracy": np.array(held_out, np.float32)}
    chunk = Chunk(0, "evaluate", 0, 0, asked[:count], tuple(range(count)))
    scores = Scores(chunk, np.ones((count, 1), np.float32), images, held_out=kept, bad=bad or {})
    name = "epoch-before" if epoch == BEFORE else f"epoch-{epoch:06d}"
    (folder / f"evaluation/{name}.parquet").write_bytes(images_table([scores], side))


def test_a_gain_is_said_with_its_interval_and_what_it_means(folder):
    forget_collapse(folder)
    lines = said(folder, "objective.beta=30", "objective.kind=dag_db")
    assert lines[0].startswith(
        "trained: towards pictures that shapes_alignment scores higher; 12 epochs of 64 pictures"
    )
    assert "dag_db: pictures with a probability proportional to exp(30 x D x reward)" in lines[0]
    (reward,) = [line for line in lines if line.startswith("evaluated reward ")]
    assert "on 19 fixed images (1 bad ones left out): +0." in reward and "95 % interval +0." in reward
    assert reward.endswith("it rose by more than chance")
    assert "diversity among a prompt's pictures: 0.3 -> 0.3, 100% of what it was" in lines
    assert "no sign of collapse in 3 evaluations" in lines
    assert len(lines) <= 12


@pytest.mark.parametrize(("change", "words"), [(-0.2, "it FELL by more than chance"), (0.0, "this may be chance")])
def test_no_gain_is_said_as_plainly(folder, change, words):
    before = np.random.default_rng(1).normal(0.5, 0.05, 20)
    moved = before + change + np.random.default_rng(2).permutation(np.repeat([-0.02, 0.02], 10))
    save_evaluation(folder, BEFORE, list(before))
    save_evaluation(folder, 11, list(moved))
    (reward,) = [line for line in said(folder) if line.startswith("evaluated reward ")]
    assert words in reward and "rose" not in reward


def test_collapse_is_the_loudest_line(folder):
    lines = said(folder)
    assert f"SIGNS OF COLLAPSE after epoch 12: {COLLAPSE}. Look at the pictures before you use this LoRA" in lines
    assert not any("no sign of collapse" in line for line in lines)


def test_without_an_evaluation_nothing_is_claimed_and_the_way_to_one_is_told(folder):
    for file in folder.glob("evaluation/epoch-*"):
        file.unlink()
    lines = said(folder, "evaluation.images=0")
    assert lines[1].startswith("not judged (evaluation.images=0): whether the reward rose is not known")
    assert not any("chance" in line or "pictures: " in line for line in lines)
    (evaluate,) = [line for line in lines if "learner.evaluate" in line and line.startswith("  ")]
    assert "--images 128" in evaluate  # it refuses 0
    lines = said(folder, "evaluation.images=0", "sampler.chunk_size=24", "train.trajectories=96")
    for command in ("evaluate", "compare"):
        (line,) = [line for line in lines if f"learner.{command}" in line and line.startswith("  ")]
        assert "--images 144" in line  # whole chunks


def test_all_bad_images_are_no_judgement(folder):
    for epoch in (BEFORE, 3, 7, 11):
        save_evaluation(folder, epoch, [None] * 20)
    assert any(line.startswith("not judged (too few evaluations, or only bad images)") for line in said(folder))


def test_a_control_is_called_one(folder):
    assert said(folder, "train.shuffle_rewards=true")[0].startswith("trained: nothing to learn from, as rewards were")


@pytest.mark.parametrize("held_out", [False, True])
def test_prompt_accuracy_is_read_off_the_pictures_or_taken_from_the_held_out_reward(folder, held_out):
    save_pictures(folder, BEFORE, (RED, RED), [0, 0] if held_out else None)
    save_pictures(folder, 11, (RED, BLUE), [1, 0] if held_out else None)
    expected = "0% -> 50%" if held_out else "50% -> 100%"
    assert f"pictures that show exactly what their prompt says: {expected}" in said(folder)


def test_bad_pictures_and_those_of_a_larger_model_are_not_read(folder, tmp_path):
    for epoch in (BEFORE, 11):
        save_pictures(folder, epoch, (RED, RED), bad={1: "a black image"})
    assert "pictures that show exactly what their prompt says: 100% -> 100%" in said(folder)
    model = tmp_path / "model"
    for part, content in (("unet", {"sample_size": 64}), ("vae", {"block_out_channels": [1, 2, 3, 4]})):
        (model / part).mkdir(parents=True)
        (model / part / "config.json").write_text(json.dumps(content))
    assert not any("exactly" in line for line in said(folder, f"model.path={model}"))


def test_prompts_of_another_world_and_small_pictures_have_no_accuracy(folder, monkeypatch):
    for epoch in (BEFORE, 11):
        save_pictures(folder, epoch, (RED, BLUE), side=32)
    assert not any("exactly" in line for line in said(folder))
    assert not any("exactly" in line for line in said(folder, "run.thumbnail_pixels=32"))
    for epoch in (BEFORE, 11):
        save_pictures(folder, epoch, (RED, BLUE))
    assert any("exactly" in line for line in said(folder))
    monkeypatch.setattr(summary, "parse", lambda caption: world.parse("a photo of a cat"))
    assert not any("exactly" in line for line in said(folder))


def test_the_end_has_the_report_and_commands_that_a_shell_takes(folder):
    lines, records = said(folder), Records.open(Storage(str(folder)))
    assert f"report: {folder}/report.html" in lines and (folder / "report.html").is_file()
    commands = [shlex.split(line, comments=True) for line in lines[lines.index("next:") + 1 :]]
    assert [command[2] for command in commands] == ["learner.evaluate", "learner.generate", "learner.compare"]
    assert all(command[1] == "-m" and str(folder) in command for command in commands)  # with a blank in its name
    assert commands[1][-2:] == ["--prompt", records.evaluation_prompt(11)]
    where = subprocess.run([commands[0][0], "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True)
    assert where.stdout.strip() == sys.prefix  # this very environment


def test_without_an_activated_environment_the_commands_name_its_python(folder, monkeypatch, tmp_path):
    other = tmp_path / "elsewhere/python"
    other.parent.mkdir()
    other.symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(other.parent))
    monkeypatch.chdir(tmp_path)
    assert summary.interpreter() == shlex.quote(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert summary.interpreter() == ".venv/bin/python"  # after `make demo`
    assert any(line.startswith("  .venv/bin/python -m learner.evaluate ") for line in said(folder))


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    say("draw \u8d64 caf\u00e9")
    assert out.buffer.getvalue() == b"draw \\u8d64 caf\xe9\n"


def test_words_that_cannot_be_found_do_not_fail_a_run(folder, monkeypatch):
    def broken(*arguments):
        raise LookupError("no such figure")

    monkeypatch.setattr(summary, "describe", broken)
    lines = said(folder)
    assert "warning: no summary: LookupError: no such figure" in lines and any("report: " in line for line in lines)


def test_a_real_run_ends_in_these_words(small_settings, tmp_path, capsys):
    settings = [*small_settings, "run.runner=inprocess", f"run.dir={tmp_path / 'run'}", "train.epochs=1"]
    assert main(settings) == 0
    first = capsys.readouterr().out.splitlines()
    end = first[next(i for i, line in enumerate(first) if line.startswith("trained: ")) :]
    assert "1 epoch of 8 pictures" in end[0] and end[-4] == "next:" and len(end) <= 12
    assert any("exactly what their prompt says" in line for line in end)
    assert main(settings) == 0  # nothing is left to do: the same words from the records
    assert capsys.readouterr().out.splitlines()[-len(end) :] == end
