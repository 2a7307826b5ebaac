import json

import numpy as np
import pytest

from diffusion.trajectory import Chunk, Scores
from learner.config import ConfigError
from learner.records import RunDirectory, contact_sheet


def scores(count: int = 4) -> list[Scores]:
    chunk = Chunk(0, "evaluate", 0, 0, ("a small red circle on a white background",) * count, tuple(range(count)))
    rewards = np.full((count, 3), np.nan, np.float32)
    rewards[:, 2] = np.arange(count)
    return [Scores(chunk, rewards, np.zeros((count, 64, 64, 3), np.uint8))]


def test_files_of_a_run(tmp_path, small_config):
    directory = RunDirectory(tmp_path / "run", small_config())
    directory.append({"epoch": -1, "loss": float("nan")})
    directory.append({"epoch": 0, "loss": 1.5})
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert lines == [{"epoch": -1, "loss": None}, {"epoch": 0, "loss": 1.5}]
    for version in (1, 2):
        latest = directory.save_latest(version, lambda folder: folder.mkdir(parents=True))
    assert json.loads((latest / "version.json").read_text()) == {"policy_version": 2}
    directory.save_evaluation("epoch-0", scores())
    assert json.loads((tmp_path / "run/evaluation/epoch-0.json").read_text())["reward"] == [0, 1, 2, 3]
    directory.save_sheet("before", scores())
    assert not [path for path in (tmp_path / "run").rglob(".*")]


def test_a_failed_save_leaves_the_last_checkpoint(tmp_path, small_config):
    directory = RunDirectory(tmp_path / "run", small_config())
    directory.save_latest(1, lambda folder: folder.mkdir(parents=True))

    def fails(folder):
        raise OSError("disk full")

    with pytest.raises(OSError):
        directory.save_latest(2, fails)
    assert json.loads((tmp_path / "run/checkpoints/latest/version.json").read_text())["policy_version"] == 1


def test_an_unwritable_directory_is_named(tmp_path, small_config):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir"):
        RunDirectory(tmp_path / "file" / "run", small_config())


def test_sheet_has_a_row_for_every_eight_images():
    assert contact_sheet(scores(4), 32).height * 2 == contact_sheet(scores(12), 32).height
