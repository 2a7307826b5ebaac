"""The report: one file, nothing from elsewhere, and what it shows is in the records."""

import base64
import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from made_up_run import COLLAPSE, LABEL, NASTY, made_up_run, name_of, save_evaluation, save_trajectories

from commands import report
from learner.config import load_config, saved_config
from records.run_folder import BEFORE, Records
from records.storage import Storage
from reports import html, model_card, summary
from reports.summary import Facts


def page_of(folder: Path) -> str:
    assert report.main([str(folder)]) == 0
    return (folder / html.FILE).read_text()


def words(page: str) -> str:
    """What is read on the page: no tags, no styles, one blank between words."""
    without = re.sub(r"<(style|title)>.*?</\1>|<[^>]*>", " ", page, flags=re.S)
    return " ".join(unescape(without).split())


def facts_of(folder: Path, lines, *settings: str) -> Facts:
    records = Records.open(Storage(str(folder)))
    records.lines = lines
    return Facts(records, load_config(overrides=settings))


@pytest.fixture(scope="module")
def page(made_up) -> str:
    return page_of(made_up)


def test_a_real_run_has_its_report_and_it_can_be_made_anew(finished_run):
    before, records = (finished_run / "report.html").read_text(), Records.open(Storage(str(finished_run)))
    text = words(before)
    for what in ("2 of 2", "finished", "95 % interval", "Where the time goes", "load_lora_weights", "run.resume=never"):
        assert what in text
    assert before.count("<img ") == 2 * 4 + before.count("best: ") + before.count("median: ") + before.count("worst: ")
    assert before.count("best: ") > 1
    made = re.compile(r"Page made [^;]+;")
    assert made.sub("", html.render(records, saved_config(records)).decode()) == made.sub("", before)


def test_it_needs_nothing_from_elsewhere_and_has_no_password(page, made_up):
    loaded = re.findall(r"""(?:src|href|xlink:href|action|poster|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert loaded and all(source.startswith(("data:", "#")) for source in loaded)
    assert not re.search(r"<script|<iframe|<object|@import|url\(|http-equiv=.refresh", page)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page  # the browser holds it to that
    assert not re.findall(r"https?://", page)
    records = Records.open(Storage(str(made_up)))
    records.about["branched_from"] = "s3://me:s3cret@store/run"
    config = load_config()
    uri = "https://me:s3cret@tracking.example/x"  # as an older run's settings may have it
    config = config.model_copy(update={"mlflow": config.mlflow.model_copy(update={"uri": uri})})
    shown = html.render(records, config).decode()
    files = [base64.b64decode(data) for data in re.findall(r"data:text/yaml;base64,([^\"']+)", shown)]
    assert files and b"tracking.example" in files[0]
    assert "s3cret" not in shown and all(b"s3cret" not in file for file in files)


def test_what_others_wrote_is_text(page, copied):
    assert "<script" not in page and "<b>the base" not in page and "<i>reward" not in page and "<space>" not in page
    text = words(page)
    for what in (NASTY, COLLAPSE, "NaN <i>reward</i> 0", "sampler <2> is gone", "no <space> left", LABEL):
        assert what in text
    assert f'alt="before: {NASTY}"' in unescape(page.replace("&#34;", "&quot;"))
    folder = copied.rename(copied.with_name("<b>run"))
    nasty = {"name": "<script>x\x00\x1b[31m", "branched_from": "</dl><script>", "git_commit": "$\\alpha$"}
    Records.open(Storage(str(folder))).note(**nasty)
    named = page_of(folder)
    assert "<script" not in named and "<b>run" not in named and "&lt;script&gt;x" in named


def test_a_long_prompt_is_shown_in_short_and_no_control_character_at_all(copied):
    prompt = "y" * 10**5 + "\x1b[2J"
    for epoch in (BEFORE, 3, 7, 11):
        table = {"prompt": [prompt], "reward": [0.5 + epoch]}
        Storage(str(copied)).write_json(f"evaluation/{name_of(epoch)}.json", table)
    records, config = Records.open(Storage(str(copied))), load_config(overrides={"prompts.path": [prompt]})
    page = re.sub('data:[^"]*', "", html.render(records, config).decode())
    assert page.count("y" * 200) <= 12 and "\x1b" not in page and len(page) < 300_000  # of the settings' line, 2,000
    assert [len(prompt.text) < 400 for prompt in html.pairs(records, [BEFORE, 11])] == [True]
    assert not any("yyy" in line for line in summary.next_commands(records, config))


def test_the_headline_is_the_paired_change(page, made_up):
    records, text = Records.open(Storage(str(made_up))), words(page)
    before, after = (records.evaluation(epoch)["reward"][:-1] for epoch in (BEFORE, 11))
    assert f"{np.mean(before):.3f} → {np.mean(after):.3f}" in text
    assert f"+{np.mean(after) - np.mean(before):.3f}" in text
    assert "19 fixed pictures (1 bad ones left out)" in text
    assert "the reward rose, and by more than the choice of pictures explains" in text
    assert "failed: StorageError" in text and "12 of 12" in text


def test_collapse_is_said_loudly_or_its_absence(page, copied):
    assert 'class="warning" role="alert"' in page
    assert f"Signs of collapse: look at the pictures. epoch 12: {COLLAPSE}" in words(page)
    lines = [json.loads(line) | {"collapse": None} for line in (copied / "metrics.jsonl").read_text().splitlines()]
    (copied / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    sound = page_of(copied)
    assert 'class="warning"' not in sound and "No sign of collapse in 3 evaluations." in words(sound)
    assert facts_of(copied, lines[:4]).collapse() == ([], None)  # nothing was evaluated since training began
    bare = [{key: value for key, value in line.items() if key != "eval_distance"} for line in lines]
    assert "diversity was not measured" in facts_of(copied, bare).collapse()[1]


def test_there_is_a_curve_for_whatever_was_measured(page):
    titles = re.findall(r'class="chart" [^>]*aria-label="([^"]+)"', page)
    assert [unescape(title) for title in titles] == [
        "Reward", "Part of the reward: sharp & bright", f"Part of the reward: {LABEL}", "Held-out reward: held out",
        "Parts of the reward's variance",
        "Different pictures (Vendi score)", "Distance within a prompt",
        "Loss", "Clipped", "Step size", "Gradient norm before clipping", "Staleness", "Seconds an epoch",
    ]  # fmt: skip
    assert words(page).count("bold: mean of 3 epochs") == 10  # the training figures; evaluations are not smoothed
    assert page.count("stroke-opacity: 0.65") == 3  # intervals of the three evaluations
    assert "flow-only fits" not in page  # it was never anything but null


def test_it_says_what_it_shows(page):
    text = words(page)
    for said in (
        "not chosen by how they came out",
        "Evaluation after 24 policy updates", "0.612 0.580 to 0.640 0.500 0.010 up to 0.025",  # the newer one
        "256 pictures of 8 prompts, noise seed 3, features pixels", "distance no prompt has two",
        "over the base, same noise: +0.110 (+0.090 to +0.130)",
        "the same figure of the base model makes against itself, drawn with other seeds",
        f"Held out: {LABEL} a reward not trained on 7.250", "−0.002 – 1.00e−04",  # no interval, no base
        "2 trajectories went with an actor or a node and were made again; 12 were bad and set aside",
        "and 2 more in quarantine/", "Last events (3 since the last start)",
    ):  # fmt: skip
        assert said in text
    assert "0.111" not in text and "effective number of different pictures" not in text
    assert page.count('alt="before: ') == page.count('alt="after epoch 12: ') == 20


def test_how_to_make_it_again_and_how_to_load_the_lora(page, made_up, tmp_path):
    text = words(page)
    assert "git checkout a1b2c3 (files were changed since that commit)" in text
    assert ".venv/bin/python -m learner.run --config config.yaml run.dir=runs/again run.resume=never" in text
    source = re.search(r'download="config.yaml" href="data:text/yaml;base64,([^"]+)"', page)[1]
    (tmp_path / "saved.yaml").write_bytes(base64.b64decode(source))
    assert load_config(tmp_path / "saved.yaml") == saved_config(Records.open(Storage(str(made_up))))
    lora = f"{made_up}/checkpoints/latest/lora"
    assert f'pipe.load_lora_weights("{lora}")' in text and "num_inference_steps=10, eta=1.0, guidance_scale=3.0" in text
    config = saved_config(Records.open(Storage(str(made_up))))
    code = model_card.usage(config, "diffusers", config.model.path, lora)  # the model card's own, scheduler and all
    assert "set_alpha_to_one=False" in code and all(line in text for line in code.splitlines())


def test_without_prompts_and_evaluations(tmp_path):
    folder = made_up_run(tmp_path / "run", 4, ("prompts.path=null", "model.path=some/ddpm", "evaluation.images=0"))
    shutil.rmtree(folder / "evaluation")
    text = words(page_of(folder))
    assert "PeftModel.from_pretrained" in text and "StableDiffusionPipeline" not in text
    assert "evaluation.images is 0" in text


def remove(folder, *patterns):
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def no_thumbnails(folder):
    for epoch in range(12):
        save_trajectories(folder, epoch, [0.25, 0.75], thumbnails=False)


def all_bad(folder):
    for epoch in range(12):
        save_trajectories(folder, epoch, [None, None])
    for epoch in (BEFORE, 3, 7, 11):
        save_evaluation(folder, epoch, [None] * 20)


def one_epoch(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
    remove(folder, "trajectories/*[1-9].parquet", "trajectories/*10.parquet")


def torn_views(folder):
    for path in (*folder.glob("trajectories/*"), *folder.glob("evaluation/*.png"), *folder.glob("evaluation/step-*")):
        path.write_bytes(path.read_bytes()[:50])
    (folder / "status.json").write_text("{")


BEGUN = ("metrics.jsonl", "status.json", "trajectories", "evaluation", "quarantine", "checkpoints")


@pytest.mark.parametrize(
    ("change", "there", "not_there"),
    [
        (BEGUN, ("0 of 12", "none is closed yet", "No checkpoint is written yet", "not finished"), ("Curves",)),
        (["evaluation/epoch-0*"], ("How far it has come shows once", "The first 20 pictures"),
         ("95 % interval", "after epoch")),
        (["evaluation/*before*"], ("after epoch 12", "The first 20 pictures"), ("95 % interval", "before 0")),
        (["evaluation"], ("How far it has come shows once", "Curves", "Best, median"), ("The same prompts and noise",)),
        (no_thumbnails, ("Curves",), ("Best, median",)),
        (all_bad, ("How far it has come shows once", "before –"), ("Best, median", "nan")),
        (one_epoch, ("1 of 12", "Trajectories of epoch 1 by reward"), ("Seconds an epoch", "bold: mean")),
        (torn_views, ("95 % interval", "not finished", "12 of 12"), ("Best, median", "The same prompts", "Floor")),
    ],
)  # fmt: skip
def test_it_works_with_whatever_is_there(copied, change, there, not_there):
    change(copied) if callable(change) else remove(copied, *change)
    text = words(page_of(copied))
    assert [what for what in there if what not in text] == []
    assert [what for what in not_there if what in text] == []


def test_what_is_no_run_is_said_in_one_line(copied, capsys):
    def refused() -> None:
        assert report.main([str(copied)]) == 2
        *warnings, message = capsys.readouterr().err.splitlines()
        assert message.startswith("learner.report: ") and str(copied) in message
        assert all(": warning: config.yaml in " in line for line in warnings)  # there is no copy of it

    line = json.loads((copied / "metrics.jsonl").read_text().splitlines()[1]) | {"reward_mean": "high"}
    for name, damage in {"metrics.jsonl": json.dumps(line) + "\n", "run.json": "{]", "config.yaml": "{]"}.items():
        whole = (copied / name).read_text()
        for content in {damage, "{]"}:
            (copied / name).write_text(content)
            refused()
        (copied / name).write_text(whole)
    shutil.rmtree(copied)
    refused()


def test_a_link_out_of_the_run_is_not_followed(copied, tmp_path):
    (copied / "trajectories").rename(tmp_path / "outside")
    (copied / "trajectories").mkdir()
    for path in (tmp_path / "outside").iterdir():
        (copied / "trajectories" / path.name).symlink_to(path)
    assert "Best, median" not in words(page_of(copied))


@pytest.mark.long
def test_it_stays_small(tmp_path):
    assert len(page_of(made_up_run(tmp_path / "demo", 40))) < 3e6


def test_numbers_for_people():
    for value, sign, text in (
        (0.78866, False, "0.789"), (0.1, True, "+0.100"), (-0.1, True, "−0.100"), (0.0, True, "0.000"),
        (-0.0, True, "0.000"), (12.345, False, "12.35"), (-30.25, False, "−30.25"), (12345.6, False, "12,346"),
        (4.44e-4, False, "4.44e−04"), (float("nan"), True, "–"), (None, False, "–"),
    ):  # fmt: skip
        assert summary.number(value, sign) == text
    assert summary.number(0.00004, True, like=0.7) == "0.000" and summary.number(0.0123, True, 25.0) == "+0.01"


def test_the_parts_of_an_epoch_follow_each_other(made_up):
    line = {"sample_seconds": 2.0, "score_seconds": 3.0, "train_seconds": 4.0, "seconds": 10.0, "trajectories": 20}
    line |= {"epoch": 0, "evaluate_seconds": 0.5}
    alone = "run.runner=inprocess"
    for runner, wanted in (("run.runner=ray", [2.0, 1.0, 4.0, 0.5, 2.5]), (alone, [2.0, 3.0, 4.0, 0.5, 0.5])):
        assert [seconds for _, seconds, _ in facts_of(made_up, [line], runner).timings()] == wanted
    parts = facts_of(made_up, [line, line, line | {"seconds": 30.0}], alone).timings()
    assert [share for *_, share in parts] == [0.12, 0.18, 0.24, 0.03, 0.43]  # seconds and shares of one total
    assert sum(seconds for _, seconds, _ in parts) == 50.0
    twice = facts_of(made_up, [line, line], alone)
    assert (twice.rate, twice.seconds) == (2.0, 20.0) and facts_of(made_up, [], alone).timings() == []
