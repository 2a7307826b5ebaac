"""The report's pictures: the right ones, beside their own rewards, and small."""

import base64
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_up_run import PROMPTS, name_of, picture, save_trajectories
from PIL import Image

from diffusion.trajectory import Chunk, Scores
from records.run_folder import BEFORE, Records
from records.storage import Storage
from reports import html
from reports.pictures import contact_sheet, tiles


def test_pairs_stand_side_by_side_with_their_rewards(made_up):
    records = Records.open(Storage(str(made_up)))
    prompts = html.pairs(records, [BEFORE, 3, 7, 11])
    assert sum(len(prompt.rows) for prompt in prompts) == 20 and [prompt.text for prompt in prompts] == list(PROMPTS)
    rewards = {epoch: records.evaluation(epoch)["reward"] for epoch in (BEFORE, 11)}
    for i, prompt in enumerate(prompts):
        for k, row in enumerate(prompt.rows):
            number = i + k * len(PROMPTS)
            assert [shot.label for shot in row] == ["before", "after epoch 12"]
            assert [shot.reward for shot in row] == [rewards[BEFORE][number], rewards[11][number]]
            for shot, epoch in zip(row, (BEFORE, 11), strict=True):
                assert colour(shot.source) == pytest.approx(picture(number + 1 + epoch + 1, 1).ravel(), abs=4)
    assert prompts[19 % len(PROMPTS)].rows[-1][0].reward is None


def test_sheets_of_other_prompts_are_no_pairs(copied):
    table = json.loads((file := copied / "evaluation/epoch-before.json").read_text())
    file.write_text(json.dumps(table | {"prompt": table["prompt"][::-1]}))
    prompts = html.pairs(Records.open(Storage(str(copied))), [BEFORE, 11])
    assert {shot.label for prompt in prompts for row in prompt.rows for shot in row} == {"after epoch 12"}


def colour(source: str) -> np.ndarray:
    content = base64.b64decode(source.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float64).mean((0, 1))


def test_best_median_and_worst_are_those_of_the_last_epochs(made_up):
    prompts, first, last = html.extremes(Records.open(Storage(str(made_up))))
    epochs = range(12 - html.LAST_EPOCHS, 12)
    rows = [row for e in epochs for row in pq.read_table(made_up / f"trajectories/{name_of(e)}.parquet").to_pylist()]
    assert (first, last) == (8, 12) and 0 < len(prompts) <= html.PROMPTS
    groups = {}
    for row in sorted((row for row in rows if row["reward"] is not None), key=lambda row: row["reward"]):
        groups.setdefault(row["prompt"], []).append(row)
    assert {prompt.text: prompt.count for prompt in prompts} == {text: len(some) for text, some in groups.items()}
    assert [prompt.count for prompt in prompts] == sorted(map(len, groups.values()), reverse=True)
    for prompt in prompts:
        some = groups[prompt.text]
        wanted = {"best": some[-1], "median": some[(len(some) - 1) // 2], "worst": some[0]}
        (shown,) = prompt.rows
        assert [(shot.label, shot.reward) for shot in shown] == [(key, row["reward"]) for key, row in wanted.items()]
        for shot in shown:
            thumbnail = picture(wanted[shot.label]["trajectory_id"], 1).ravel()
            assert colour(shot.source) == pytest.approx(thumbnail, abs=4)


def test_of_few_trajectories_there_is_what_there_is_small_and_what_is_no_picture_is_left_out(tmp_path, monkeypatch):
    save_trajectories(tmp_path, 0, [0.5, 1.0, 3.0, 2.0, None, None, None, 0.75, 0.1])  # by prompt 0 1 2 3 4 0 1 0 1
    records = Records(Storage(str(tmp_path)), {}, [{"epoch": 0}])
    prompts, *_ = html.extremes(records)
    labels = [[(shot.label, shot.reward) for shot in prompt.rows[0]] for prompt in prompts]
    assert [len(row) for row in labels[:2]] == [2, 2] and labels[0] == [("best", 0.75), ("worst", 0.5)]
    assert labels[2] == [("the only one", 3.0)]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 300, 3), np.uint8))
    source = html._jpeg(noise)
    assert source.startswith("data:image/jpeg") and len(source) < 80_000
    assert Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))).size == (144, 192)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # a picture that would fill the memory
    assert html.extremes(records)[0] == []


def test_tiles_are_the_pictures_of_a_sheet():
    images = np.stack([picture(i, 64) for i in range(11)])
    scores = [Scores(Chunk(0, "evaluate", 0, 0, ("p",) * 11, tuple(range(11))), np.zeros((11, 1), np.float32), images)]
    cut = tiles(contact_sheet(scores), 40)
    assert len(cut) == 16 and all(tile.size == (128, 128) for tile in cut)
    assert all(np.all(np.asarray(tile) == image[0, 0]) for tile, image in zip(cut, images, strict=False))
