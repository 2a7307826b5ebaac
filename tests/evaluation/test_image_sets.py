"""Sets of judged pictures: what their files hold beside rewards, and by what settings they are drawn."""

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from diffusion.snapshot import Snapshot
from diffusion.trajectory import Chunk, Nats, Scores
from evaluation.adapters import _needed
from evaluation.image_sets import ImageSet, image_rows, read_images
from learner.config import load_config
from records.run_folder import IMAGES, parquet
from records.storage import StorageError

KL = np.arange(6, dtype=np.float32).reshape(2, 3)


def scores(nats: Nats | None) -> Scores:
    chunk = Chunk(0, "evaluate", 0, 0, ("a", "b"), (0, 1))
    return Scores(chunk, np.array([[0.5], [np.nan]], np.float32), bad={1: "black"}, nats=nats)


def test_nats_go_through_the_file():
    rows = image_rows([scores(Nats(KL - 1, KL))], 0)
    seen = read_images(parquet(rows, IMAGES))
    assert seen.kl is not None and seen.log_ratio is not None
    np.testing.assert_array_equal(seen.kl, KL)
    np.testing.assert_array_equal(seen.log_ratio, [0, 9])


def test_files_without_nats_are_read_and_torn_ones_are_not():
    plain = parquet(image_rows([scores(None)], 0), IMAGES)
    table = pq.read_table(io.BytesIO(plain)).drop_columns(["kl", "log_ratio"])
    pq.write_table(table, older := io.BytesIO())
    for content in (plain, older.getvalue()):
        seen = read_images(content)
        assert seen.kl is None and seen.log_ratio is None and seen.rewards[0] == 0.5
    rows = image_rows([scores(Nats(KL, KL))], 0)
    rows[0]["kl"] = [1.0]
    with pytest.raises(StorageError, match=r"SOMEWHERE is damaged"):
        read_images(parquet(rows, IMAGES), "SOMEWHERE")


def test_a_set_is_drawn_with_noise_where_its_run_has_it():
    adapter: Any = SimpleNamespace(rank=2, alpha=2.0)
    whole = ["objective.kind=rtb", "flow.fit_steps=0", "flow.warmup_steps=0", "sampler.steps=8"]
    window = [*whole, "objective.window=[1,3]", "objective.last_transition=train", "sampler.noise=window"]
    made = {}
    for steps, settings in ((8, whole), (4, window)):
        config = load_config(overrides=settings)
        needed = _needed(config, adapter, ["a red circle"])
        assert needed.rollout_settings().noise_steps == config.rollout_settings().noise_steps == steps
        made[steps] = ImageSet(needed, ("a red circle",), Snapshot(0, np.zeros(3, np.float32), "0"))
    assert "noise_steps" not in made[8].settings and made[4].settings["noise_steps"] == 4
    assert made[8].name != made[4].name
