"""The reward ocr: what a prompt asks for, what is read, and how near they are."""

import csv
import random
import sys

import numpy as np
import pytest
import torch
from brightness import scorer
from PIL import Image
from words import as_images, draw, page

from commands import score
from diffusion.trajectory import Chunk, CleanPredictions
from learner.prompts import Prompt
from learner.run import main
from rewards import prompt_sets, registry
from rewards.ocr import asked_for

TEXTS = (
    "OPEN", "CLOSED", "Bakery", "Coffee", "Welcome", "EXIT", "Library", "Fresh Bread", "Museum", "Harbour", "Station",
    "Tickets", "Garden", "Orange", "Sunday", "Music", "Books", "Hotel", "Summer", "SALE", "Happy Birthday", "Danger",
    "Private", "Kitchen", "Pharmacy", "Flowers", "Market", "Thank you", "Good morning", "Hello World", "Room 101",
    "24 hours", "NO PARKING", "Fresh fish", "Keep out", "Since 1987", "Lemon tea", "One way", "50% off", "Mind the gap",
)  # fmt: skip


@pytest.fixture(scope="module")
def ocr():
    return registry.load("ocr")


@pytest.mark.parametrize(
    ("prompt", "columns", "asked"),
    [
        ('a sign that says "OPEN"', {}, "OPEN"),
        ('"FRESH" above, "BREAD" below', {}, "FRESH BREAD"),
        ("a sign that says “Open now”", {}, "Open now"),
        ("ein Schild: „Offen“", {}, "Offen"),
        ("une enseigne «Ouvert»", {}, "Ouvert"),
        ("看板「営業中」", {}, "営業中"),
        ('a 5" screen, 7" wide, that says "HELLO"', {}, "HELLO"),
        ("a dog's plate that says \"REX'S\"", {}, "REX'S"),
        ('a sign that says "OPEN"', {"text": "CLOSED", "tag": "x"}, "CLOSED"),
        ("a house with a number", {"text": 42}, "42"),
        ('a sign that says "OPEN"', {"text": ""}, "OPEN"),  # an empty cell of a table
        ('a sign that says "OPEN"', {"text": None}, "OPEN"),
    ],
)
def test_the_text_asked_for_is_the_column_or_what_is_quoted(prompt, columns, asked):
    assert asked_for(prompt, columns) == asked


@pytest.mark.parametrize(
    ("prompt", "columns"),
    [
        ("a dog", {}), ('a 5" by 7" card', {}), ('the sign ""', {}), ('the sign " "', {}), ("a rock 'n' roll club", {}),
        ("a poster of the '90s in the boys' room", {}), ('"unfinished', {}), ('"OPEN"', {"text": ["OPEN"]}),
        ("a dog", {"text": " "}),
    ],
)  # fmt: skip
def test_a_prompt_that_asks_for_no_text_is_named(ocr, prompt, columns):
    said = f"prompt {prompt!r} asks for no text"
    for ask in (
        lambda: ocr.check_prompts(['"A"', Prompt(prompt, columns)]),
        lambda: ocr(torch.ones(2, 3, 8, 8), ['"A"', prompt], [{}, columns]),
    ):
        with pytest.raises(ValueError, match="between double quotes") as caught:
            ask()
        assert said in str(caught.value) and "column 'text'" in str(caught.value)


def test_a_run_is_refused_before_it_starts(small_settings, tmp_path, capsys):
    settings = [*small_settings, "run.runner=inprocess", f"run.dir={tmp_path / 'run'}", "reward.name=ocr"]
    rtb = ["objective.kind=rtb", "flow.fit_steps=0", "flow.warmup_steps=0"]
    for further, said in (
        ([*rtb, 'prompts.path=["a \\"A\\"", a dog]'], "prompt 'a dog' asks for no text"),
        (["prompts.path=quoted_words"], "judges finished pictures alone, and dag_db asks it at every inner state"),
    ):
        assert main([*settings, *further]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "has settings for dag_db" not in line]
        assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "run").exists()


def test_the_score_is_one_minus_the_edits_over_the_length(ocr):
    for found, asked, expected in (
        ("OPEN", "open", 1), ("O PEN\n", "OPEN", 1), ("OPFN", "OPEN", 0.75), ("PEN", "OPEN", 0.75), ("", "OPEN", 0),
        ("OPEN OPEN OPEN", "OPEN", 0), ("OPEN!", "OPEN", 0.75), ("xyz", "OPEN", 0), ("ＯＰＥＮ！", "open!", 1),
        ("Straße", "STRASSE", 1), ("don't", "don’t", 1), ("2 - 4", "2–4", 1),
    ):  # fmt: skip
        assert ocr.score(found, asked) == pytest.approx(expected), found


def test_words_are_read_line_by_line(ocr):
    slanted = ((20, 200, 50, "one"), (200, 200, 50, "two"), (380, 200, 50, "three"))
    for picture, expected in (
        (page((20, 300, 30, "only"), (180, 300, 90, "TODAY")), "only TODAY"),
        (page(*slanted, turned=8), "one two three"),
        (page(*slanted, turned=-8), "one two three"),
        (page((150, 100, 60, "FRESH"), (20, 160, 60, "BREAD"), (150, 220, 60, "daily")), "FRESH BREAD daily"),
        (page((60, 250, 100, "OPEN"), turned=180), ""),  # on its head
        (page(), ""),
    ):
        assert ocr.read(picture) == expected


def test_scores_are_the_same_at_any_batch_and_any_number_of_threads(ocr):
    """Also of a second reader; the reader and OpenCV keep to torch's threads."""
    import cv2

    rng = random.Random(1)
    texts = ["Harbour", "Lemon tea", "EXIT", "SALE"]
    images = as_images(*(draw(text, 64, rng) for text in texts))  # some are misread
    prompts = [f'a sign "{text}"' for text in texts]
    alone = torch.cat([ocr(images[i : i + 1], prompts[i : i + 1]) for i in range(4)])
    assert alone.dtype == torch.float32 and torch.equal(ocr(images, prompts), alone) and len(alone.unique()) > 1
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            reader = registry.load("ocr")
            assert torch.equal(reader(images, prompts), alone) and cv2.getNumThreads() == threads
            sessions = reader.reader.text_det.infer, reader.reader.text_rec.session, reader.reader.text_cls.infer
            options = [session.session.get_session_options() for session in sessions]
            assert {(each.intra_op_num_threads, each.inter_op_num_threads) for each in options} == {(threads, 1)}
    finally:
        torch.set_num_threads(1)


@pytest.mark.long
@pytest.mark.parametrize("pixels", [512, 256, 128])
def test_it_reads_a_folder_of_rendered_words(pixels, tmp_path, capsys):
    """The issue's proof, by the command. At 64 pixels a line of 7 pixels' height is not to be read by anybody."""
    rng = random.Random(pixels)
    (folder := tmp_path / "pictures").mkdir()
    for i, text in enumerate(TEXTS):
        Image.fromarray(draw(text, pixels, rng)).save(folder / f"{i:03d}.png")
    (tmp_path / "prompts.txt").write_text("\n".join(f'a sign that says "{text}"' for text in TEXTS))
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "scores.csv"), str(folder)]
    assert score.main(["--reward", "ocr", *arguments]) == 0
    capsys.readouterr()
    with (tmp_path / "scores.csv").open() as file:
        scores = np.array([float(row["score"]) for row in csv.DictReader(file)])
    assert len(scores) == 40 and (scores == 1).mean() >= 0.95 and scores.mean() >= 0.98


def test_through_the_scorer_it_is_graded_and_refused_nowhere(ocr):
    """Rendered pictures through a stand-in decoder: right, one letter off, two, another word, none; a noisy picture."""
    texts = ("OPEN", "OPEM", "SPEW", "CLUB", "")
    pictures = [page((60, 300, 120, text)) for text in texts]
    noise = np.random.default_rng(0).integers(0, 256, pictures[0].shape).astype(np.uint8)
    latents = as_images(*pictures, noise).numpy()
    prompts = ('a sign that says "OPEN"',) * len(latents)
    chunk = Chunk(0, "train", 1, 0, prompts, tuple(range(len(latents))))
    rows = np.arange(len(latents))
    clean = CleanPredictions(chunk, 1, latents, rows, np.ones(len(rows), int), 1)
    scores = scorer(ocr).score(clean)
    assert scores.rewards[:, 1].tolist() == [1.0, 0.75, 0.5, 0.0, 0.0, 0.0] and not scores.bad
    assert np.isnan(scores.rewards[:, 0]).all()


def test_what_is_missing_is_said_with_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)  # as where it is not installed
    Image.fromarray(page()).save(tmp_path / "a.png")
    (tmp_path / "prompts.txt").write_text('"A"')
    assert score.main(["--reward", "ocr", "--prompts", str(tmp_path / "prompts.txt"), str(tmp_path / "a.png")]) == 2
    said = capsys.readouterr().err
    assert "rapidocr_onnxruntime" in said and "pip install -c constraints.txt -e '.[ocr]'" in said
    assert len(said.splitlines()) == 1

    class NoScreen:  # as where the system has no OpenGL
        def find_spec(self, name, path=None, target=None):
            if name == "cv2":
                raise ImportError("libGL.so.1: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoScreen(), *sys.meta_path])
    with pytest.raises(registry.UnknownReward, match=r"libGL\.so\.1.*apt-get install libgl1"):
        registry.load("ocr")


def test_every_prompt_of_the_set_asks_for_text(ocr):
    prompts = prompt_sets.fetch("quoted_words")
    assert len(prompts) == len(set(prompts)) == 60
    ocr.check_prompts(prompts)
    texts = {asked_for(prompt, {}) for prompt in prompts}
    assert len(texts) == 60 and all('"' not in text for text in texts)
