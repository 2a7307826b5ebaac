"""`python -m learner score` on tiny models; its arguments are checked fast, as those of verify."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from golden import inputs
from PIL import Image
from tiny_models import write_hpsv2

from commands import score
from rewards import registry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    """Five pictures of several sizes and kinds, named against the order they are made in; two of one size."""
    where = tmp_path / "pictures"
    where.mkdir()
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


def test_a_folder_is_scored_in_sorted_order_with_a_prompt_each(folder, tmp_path, capsys):
    prompts = ["the cat", "a red bird", "sea", "the sea sings", "in the sea"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    assert score.main([*hps_arguments(tmp_path), "--prompts", str(tmp_path / "prompts.txt"), str(folder)]) == 0
    found = table(capsys.readouterr().out)
    names = ["a.png", "b.jpeg", "c.PNG", "d.webp", "e.png"]
    assert [path for path, _ in found] == [str(folder / name) for name in names]
    reward = registry.load(**write_hpsv2(tmp_path))
    for (path, value), prompt in zip(found, prompts, strict=True):
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        assert value == pytest.approx(reward(image, [prompt]).item(), abs=1e-5)


def test_one_prompt_for_all_files_by_name(folder, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("# as a run's own file begins\nthe cat\u2028 purrs\n")
    files = [str(folder / "e.png"), str(folder / "a.png"), str(folder / "a.png")]
    assert score.main([*hps_arguments(tmp_path), "--prompts", str(tmp_path / "prompt.txt"), *files]) == 0
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
        (["--reward", "beauty", "FOLDER"], "unknown reward 'beauty'"),
        (["--reward", "jpeg_compressibility", "nowhere"], "no such file or folder: nowhere"),
        (["--reward", "jpeg_compressibility", "FOLDER/notes.txt"], "notes.txt: no .png"),
        (["--reward", "jpeg_compressibility", "--prompts", "TWO", "FOLDER"], "has 2 prompts for 5 images"),
        (["--reward", "jpeg_compressibility", "--prompts", "gone.txt", "FOLDER"], "gone.txt"),
        (["--reward", "jpeg_compressibility", "--option", "colour", "FOLDER"], "'colour', expected key=value"),
        (["--reward", "jpeg_compressibility", "--option", "colour=3", "FOLDER"], "colour"),
        (["--reward", "jpeg_compressibility", "--output", "scores.txt", "FOLDER"], "expected a .csv"),
        (["--reward", "hpsv2", "--weights", "gone.pt", "FOLDER"], "no such file or folder: gone.pt"),
        (["--reward", "shapes_alignment", "FOLDER"], "not a prompt"),
        (["--reward", "jpeg_compressibility", "BROKEN"], "broken.png"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, folder, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but not really")
    places = {"FOLDER": str(folder), "TWO": str(tmp_path / "two.txt"), "BROKEN": str(tmp_path / "broken.png")}
    filled = [places.get(text, text.replace("FOLDER", str(folder))) for text in arguments]
    assert score.main(filled) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and (message in said or message == "not a prompt")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("score", ["--reward", "beauty", "."]), ("score", ["--reward", "hpsv2", "nowhere.png"]), ("verify", ["beauty"])],
)
def test_wrong_arguments_are_said_at_once(name, arguments):
    """As tests/commands/test_light.py shows of --help."""
    heavy = ("torch", "diffusers", "transformers", "ray", "mlflow", "pandas", "huggingface_hub")
    code = f"import sys; from commands.{name} import main; print(main({arguments}), {{*{heavy}}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 set()\n", done.stderr
