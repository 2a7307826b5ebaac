"""`python -m learner score` on tiny models; that its arguments are checked fast is in test_light.py."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from golden import inputs
from PIL import Image
from tiny_models import write_hpsv2

from commands import score
from rewards import registry


@pytest.fixture
def folder(tmp_path):
    """Five pictures of several sizes and kinds, named against the order they are made in; two of one size."""
    (where := tmp_path / "pictures").mkdir()
    pictures = inputs.pictures()
    names = ["e.png", "d.webp", "c.PNG", "b.jpeg", "a.png"]
    for name, picture in zip(names, [*pictures[:4], pictures[3].transpose(1, 0, 2)], strict=True):
        Image.fromarray(picture).save(where / name, **({"lossless": True} if name.endswith("webp") else {}))
    (where / "notes.txt").write_text("no picture")
    return where


def hps_arguments(tmp_path) -> list[str]:
    settings = write_hpsv2(tmp_path)
    return [
        "--reward", "hpsv2", "--weights", settings["weights"], "--option", f"tokenizer={settings['tokenizer']}",
        "--option", f"size={json.dumps(settings['size'])}",
    ]  # fmt: skip


def table(printed: str) -> list[tuple[str, float]]:
    return [(path, float(value)) for path, value in (line.split("\t") for line in printed.splitlines())]


def test_a_folder_is_scored_in_sorted_order_with_a_prompt_each_or_one_for_all(folder, tmp_path, capsys):
    prompts = ["the cat", "a red bird", "sea", "the sea sings", "in the sea"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    arguments = [*hps_arguments(tmp_path), "--prompts", str(tmp_path / "prompts.txt")]
    assert score.main([*arguments, str(folder)]) == 0
    found = table(capsys.readouterr().out)
    names = ["a.png", "b.jpeg", "c.PNG", "d.webp", "e.png"]
    assert [path for path, _ in found] == [str(folder / name) for name in names]
    reward = registry.load(**write_hpsv2(tmp_path))
    for (path, value), prompt in zip(found, prompts, strict=True):
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        assert value == pytest.approx(reward(image, [prompt]).item(), abs=1e-5)
    (tmp_path / "prompts.txt").write_text("# as a run's own file begins\nthe cat\u2028 purrs\n")
    assert score.main([*arguments, *(str(folder / name) for name in ("e.png", "a.png", "a.png"))]) == 0
    assert [path for path, _ in table(capsys.readouterr().out)] == [str(folder / "a.png"), str(folder / "e.png")]


def test_a_table_is_written_and_mean_and_spread_said(folder, tmp_path, capsys):
    output = tmp_path / "new" / "scores.csv"
    assert score.main(["--reward", "jpeg_incompressibility", "--output", str(output), str(folder)]) == 0
    captured = capsys.readouterr()
    paths, values = zip(*table(captured.out), strict=True)
    assert captured.err.startswith(f"5 pictures: mean {np.mean(values):.4g}, standard deviation {np.std(values):.4g}, ")
    assert captured.err.endswith(f"from {min(values):.4g} to {max(values):.4g}\n")
    rows = pd.read_csv(output, keep_default_na=False)
    assert tuple(rows["image"]) == paths and len(rows) == 5 and set(rows["prompt"]) == {""}
    np.testing.assert_allclose(rows["score"], values, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("beauty pictures", "unknown reward 'beauty'"),
        ("jpeg_compressibility nowhere", "no such file or folder: nowhere"),
        ("jpeg_compressibility pictures/notes.txt", "notes.txt: no .png"),
        ("jpeg_compressibility --prompts two.txt pictures", "has 2 prompts for 5 images"),
        ("jpeg_compressibility --prompts gone.txt pictures", "gone.txt"),
        ("jpeg_compressibility --option colour pictures", "'colour', expected key=value"),
        ("jpeg_compressibility --option colour=3 pictures", "colour"),
        ("jpeg_compressibility --output scores.txt pictures", "expected a .csv"),
        ("jpeg_compressibility --output broken.png/s.csv pictures", "broken.png is a file"),
        ("jpeg_compressibility --output folder.csv pictures", "--output: folder.csv: "),
        ("hpsv2 --weights gone.pt pictures", "no such file or folder: gone.pt"),
        ("shapes_alignment pictures", ""),  # which has no prompts
        ("jpeg_compressibility broken.png", "broken.png"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, folder, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but not really")
    assert message in refused("score", "--reward", *arguments.split())


def test_columns_of_the_prompt_file_reach_the_reward(tmp_path, monkeypatch, capsys):
    code = (
        "import torch\ndef f(images, prompts, metadata):\n    return torch.tensor([float(m['n']) for m in metadata])\n"
    )
    (tmp_path / "own_score_columns.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "p.csv").write_text("prompt,n\nx,3\ny,4\n")
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name)
    given = ["--reward", "own_score_columns:f", "--prompts", str(tmp_path / "p.csv"), str(tmp_path / "pictures")]
    assert score.main(given) == 0
    assert [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()] == ["3", "4"]
