"""The report's pictures: the right ones, beside their own rewards, and small."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up_run import PROMPTS, made_up_run, name_of, picture, save_trajectories
from PIL import Image

from diffusion.trajectory import Chunk, Scores
from records.run_folder import BEFORE, SCHEMA, Records
from records.storage import Storage
from reports import html_pictures
from reports.pictures import contact_sheet, png, tiles


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    return made_up_run(tmp_path_factory.mktemp("runs") / "made-up")


def test_pairs_stand_side_by_side_with_their_rewards(made_up):
    gallery = html_pictures.pairs(Records.open(Storage(str(made_up))), [BEFORE, 3, 7, 11])
    assert gallery.pictures == 20 and [one.text for one in gallery.prompts] == list(PROMPTS)
    rewards = {
        epoch: json.loads((made_up / f"evaluation/{name_of(epoch)}.json").read_text())["reward"]
        for epoch in (BEFORE, 11)
    }
    for i, prompt in enumerate(gallery.prompts):
        for k, pair in enumerate(prompt.pairs):
            number = i + k * len(PROMPTS)
            assert [shot.label for shot in pair.pictures] == ["before", "after epoch 12"]
            assert [shot.reward for shot in pair.pictures] == [rewards[BEFORE][number], rewards[11][number]]
            for shot, epoch in zip(pair.pictures, (BEFORE, 11), strict=True):
                assert colour(shot.source) == pytest.approx(picture(number + 1 + epoch + 1, 1).ravel(), abs=4)
    last = gallery.prompts[19 % len(PROMPTS)].pairs[-1]
    assert last.pictures[0].reward is None and last.gain is None


def colour(source: str) -> np.ndarray:
    """Mean [3] of a picture in the page."""
    content = base64.b64decode(source.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float64).mean((0, 1))


def test_best_median_and_worst_are_those_of_the_last_epochs(made_up):
    found = html_pictures.extremes(Storage(str(made_up)))
    epochs = range(12 - html_pictures.LAST_EPOCHS, 12)
    rows = [row for e in epochs for row in pq.read_table(made_up / f"trajectories/{name_of(e)}.parquet").to_pylist()]
    assert (found.first, found.last) == (8, 12) and 0 < len(found.prompts) <= html_pictures.PROMPTS
    counts = {}
    for row in rows:
        if row["reward"] is not None:
            counts[row["prompt"]] = counts.get(row["prompt"], 0) + 1
    assert {one.text: one.count for one in found.prompts} == counts
    assert [one.count for one in found.prompts] == sorted(counts.values(), reverse=True)
    for prompt in found.prompts:
        mine = sorted(
            (row for row in rows if row["prompt"] == prompt.text and row["reward"] is not None),
            key=lambda row: row["reward"],
        )
        (pair,) = prompt.pairs
        wanted = {"best": mine[-1], "median": mine[(len(mine) - 1) // 2], "worst": mine[0]}
        assert [shot.label for shot in pair.pictures] == list(wanted)
        for shot in pair.pictures:
            row = wanted[shot.label]
            assert shot.reward == row["reward"]
            assert base64.b64decode(shot.source.partition("base64,")[2]) == row["thumbnail_png"]


def test_large_thumbnails_are_made_small(tmp_path):
    folder = made_up_run(tmp_path / "run", 4)
    noise = np.random.default_rng(0).integers(0, 256, (400, 300, 3), np.uint8)
    table = pq.read_table(folder / "trajectories/epoch-000003.parquet")
    place = SCHEMA.get_field_index("thumbnail_png")
    large = pa.array([png(Image.fromarray(noise))] * len(table), pa.binary())
    pq.write_table(table.set_column(place, "thumbnail_png", large), folder / "trajectories/epoch-000003.parquet")
    shots = [
        shot
        for prompt in html_pictures.extremes(Storage(str(folder))).prompts
        for pair in prompt.pairs
        for shot in pair.pictures
    ]
    small = [shot.source for shot in shots if shot.source.startswith("data:image/jpeg")]
    assert small and all(len(source) < 80_000 for source in small)
    assert Image.open(io.BytesIO(base64.b64decode(small[0].partition("base64,")[2]))).size == (144, 192)


def test_rewards_of_a_long_run_are_thinned_and_bad_ones_left_out(tmp_path):
    for epoch in range(100):
        save_trajectories(tmp_path, epoch, [0.0, float(epoch), None], thumbnails=False)
    found = html_pictures.rewards(Storage(str(tmp_path)))
    assert len(found) == html_pictures.EPOCHS_READ
    assert (found[0][0], found[-1][0]) == (1, 100)
    assert all(values.tolist() == [0.0, epoch - 1] for epoch, values in found)


def test_tiles_are_the_pictures_of_a_sheet():
    images = np.stack([picture(i, 64) for i in range(11)])
    scores = [Scores(Chunk(0, "evaluate", 0, 0, ("p",) * 11, tuple(range(11))), np.zeros((11, 1), np.float32), images)]
    cut = tiles(contact_sheet(scores), 40)
    assert len(cut) == 16 and all(tile.size == (128, 128) for tile in cut)
    for i in range(11):
        assert np.all(np.asarray(cut[i]) == images[i, 0, 0])
