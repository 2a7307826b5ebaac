import io
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffusion.trajectory import Chunk, Receipt, Scores, Verdict
from evaluation.image_sets import image_rows, read_images
from learner.protocol.runner import EpochResult, Training
from learner.run import main
from records.run_folder import BEFORE, FORMAT, IMAGES, Records
from records.storage import Storage, StorageError

FACTS = {"config_digest": "c", "prompts_sha256": "p"}
COUNTS = dict.fromkeys(("step", "policy_version", "trajectories"), 0)
LINE = {**COUNTS, "time": 0.0, "seconds": 0.0, "eval_reward_mean": None, "updates": []}


def save(records: Records, epoch: int, pixels: int = 64, **more) -> None:
    """An evaluation as a run records it; `more` are fields of Scores."""
    records.save_evaluation(epoch, image_rows([replace(part, **more) for part in scores()], pixels), b"sheet")


def scores(count: int = 4) -> list[Scores]:
    chunk = Chunk(0, "evaluate", 0, 0, ("a small red circle on a white background",) * count, tuple(range(count)))
    rewards = np.full((count, 3), np.nan, np.float32)
    rewards[:, 2] = np.arange(count)
    return [Scores(chunk, rewards, np.zeros((count, 64, 64, 3), np.uint8))]


def result(epoch: int) -> EpochResult:
    chunks = [Chunk(i, "train", epoch, 0, (f"prompt {i}", "b"), (2 * i, 2 * i + 1)) for i in range(2)]
    receipt = Receipt(epoch, "sha", (-1.0, -2.0), (-3.0, -4.0), "node", 0.5)
    verdict = Verdict((0.25, 0.75), (b"png1", b"png2"), 0.1, {"sharp": (1.0, 2.0), "bright": (3.0, 4.0)})
    accounts = [(chunk, receipt, verdict) for chunk in chunks]
    return EpochResult(accounts, Training({}, [], (0, 1, 2, 3)), (), 1.0, 1.0, 1.0)


@pytest.fixture(params=["local", "memory"])
def records(request, tmp_path):
    url = str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path}/run"
    return Records.create(Storage(url), "run", b"", FACTS)


def test_a_run_reads_back_as_written(records):
    records.append(LINE | {"epoch": -1, "loss": float("nan")})
    records.append(LINE | {"epoch": 0, "loss": 1.5, "updates": [{"loss": float("inf")}]})
    records.note(mlflow_run_id="m")
    again = Records.open(records.storage)
    first, second = LINE | {"epoch": -1, "loss": None}, LINE | {"epoch": 0, "loss": 1.5, "updates": [{"loss": None}]}
    assert again.lines == [first, second]
    assert again.run_id == records.run_id and again.about["mlflow_run_id"] == "m"
    text = records.storage.read("metrics.jsonl").decode()
    assert [json.loads(line)["epoch"] for line in text.splitlines()] == [-1, 0]


def test_trajectories_are_rows_of_a_parquet_dataset(records):
    for epoch in range(2):
        records.save_trajectories(epoch, result(epoch).rows(records.run_id, epoch, 30.0))
    assert records.storage.entries("trajectories") == ["epoch-000000.parquet", "epoch-000001.parquet"]
    rows = pq.read_table(io.BytesIO(records.storage.read("trajectories/epoch-000001.parquet"))).to_pylist()
    assert [row["trajectory_id"] for row in rows] == [0, 1, 2, 3]
    assert rows[3] == {
        "run_id": records.run_id, "epoch": 1, "trajectory_id": 3, "policy_version": 1, "adapter_sha256": "sha",
        "prompt": "b", "metadata": None, "reward": 0.75, "reward_parts": [("sharp", 2.0), ("bright", 4.0)],
        "log_pf_sum": -2.0, "log_pb_sum": -4.0, "beta": 30.0, "thumbnail_png": b"png2",
        "sampler_node": "node", "chunk": 1, "sample_seconds": 0.5, "score_seconds": pytest.approx(0.1), "bad": None,
    }  # fmt: skip


def test_what_a_killed_run_wrote_beyond_its_checkpoint_is_dropped(records):
    for epoch in (BEFORE, 0, 1, 2):
        records.append(LINE | {"epoch": epoch})
        save(records, epoch)
        if epoch >= 0:
            records.save_trajectories(epoch, result(epoch).rows(records.run_id, epoch, 1.0))
    theirs = "trajectories/2024.parquet", "trajectories/epoch-000001-mine.csv", "evaluation/epoch-before.txt"
    for name in (*theirs, "quarantine/epoch-000001-trajectory-3.json"):
        records.storage.write(name, b"")
    records.drop_after(1)
    assert records.storage.entries("quarantine") == []
    assert [line["epoch"] for line in Records.open(records.storage).lines] == [-1, 0]
    assert "epoch-000000.parquet" in records.storage.entries("trajectories")
    assert records.evaluated() == [BEFORE, 0]
    records.drop_after(BEFORE)
    assert records.lines == [] and records.evaluated() == []
    left = [f"{folder}/{name}" for folder in ("trajectories", "evaluation") for name in records.storage.entries(folder)]
    assert left == [*theirs]


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/run"):
        Records.create(Storage(str(tmp_path / "file" / "run")), "run", b"", FACTS)


def test_each_reward_of_a_sum_is_recorded_alone(small_settings, tmp_path):
    terms = [{"name": "shapes_alignment", "weight": 2.0}, {"name": "jpeg_compressibility", "weight": 0.1}]
    settings = [
        *small_settings, "run.runner=inprocess", "train.epochs=1", "reward.name=weighted_sum",
        f"reward.options={json.dumps({'terms': terms})}", f"run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main(settings) == 0
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    rows = pq.read_table(tmp_path / "run/trajectories/epoch-000000.parquet").to_pylist()
    parts = [dict(row["reward_parts"]) for row in rows]
    for row, part in zip(rows, parts, strict=True):
        whole = 2 * part["shapes_alignment"] + 0.1 * part["jpeg_compressibility"]
        assert row["reward"] == pytest.approx(whole, abs=1e-5)  # the two nearly cancel
    assert len({part["jpeg_compressibility"] for part in parts}) > 1
    for name in parts[0]:
        assert line[f"reward_mean/{name}"] == pytest.approx(np.mean([part[name] for part in parts]), rel=1e-5)
    evaluated = json.loads((tmp_path / "run/evaluation/epoch-000000.json").read_text())
    assert set(evaluated["reward_parts"]) == set(parts[0]) and len(evaluated["reward_parts"]["shapes_alignment"]) == 4


def test_all_that_was_found_on_the_fixed_images_comes_back(records):
    """Figures of a finished adapter are no evaluation of an epoch."""
    features = np.arange(8, dtype=np.float32).reshape(4, 2)
    save(records, 0, 16, held_out={"other": np.array([1.0, np.nan, 3.0, 4.0], np.float32)}, features=features)
    images, prompts = read_images(*records.images(0)), list(scores()[0].chunk.prompts)
    assert (
        images.rewards.tolist() == [0, 1, 2, 3]
        and list(images.prompts) == prompts
        and records.storage.read("evaluation/epoch-000000.png") == b"sheet"
    )
    np.testing.assert_array_equal(images.held_out["other"], [1, np.nan, 3, 4])
    np.testing.assert_array_equal(images.features, features)
    held_out = {"other": [1, None, 3, 4]}
    assert records.evaluation(0) == {"prompt": prompts, "reward": [0, 1, 2, 3], "held_out": held_out}
    rows = pq.read_table(io.BytesIO(records.storage.read("evaluation/epoch-000000.parquet")))
    assert rows.schema.names == list(IMAGES) and rows.schema.metadata[b"tributary_format"] == str(FORMAT).encode()
    with Image.open(io.BytesIO(rows["thumbnail_png"][0].as_py())) as picture:
        assert max(picture.size) <= 16
    save(records, 0, 0)
    records.storage.write("evaluation/step-000002.json", b"{}")
    assert records.evaluated() == [0]
    rows = pq.read_table(io.BytesIO(records.storage.read("evaluation/epoch-000000.parquet")))
    assert rows["thumbnail_png"].null_count == 4  # none were asked for
