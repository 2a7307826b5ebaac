import json

import pytest

from learner import checkpoint
from learner.checkpoint import CheckpointError, OtherVersion
from learner.storage import Storage

FILES = {"learner.pt": b"weights", "lora/kohya.safetensors": b"adapter"}


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    storage = Storage(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path}/run")
    for step in (0, 2, 4):
        checkpoint.save(storage, {"step": step, "next_epoch": step // 2}, FILES)
    return storage


def newest(storage):
    warnings = []
    found = checkpoint.load_newest(storage, warnings.append)
    return found, warnings


def test_the_newest_comes_back(storage):
    found, warnings = newest(storage)
    assert found.name == "checkpoints/step-000004" and found.files == FILES and found.manifest["next_epoch"] == 2
    assert warnings == []
    assert newest(Storage(f"{storage}/empty")) == (None, [])


@pytest.mark.parametrize("file", ["learner.pt", "state.json"])
def test_a_torn_or_changed_one_is_passed_over_with_a_warning(storage, file):
    name = f"checkpoints/step-000004/{file}"
    storage.write(name, storage.read(name)[:-3])
    found, warnings = newest(storage)
    assert found.manifest["step"] == 2 and len(warnings) == 1 and "step-000004" in warnings[0]


def test_one_with_a_file_missing_is_passed_over(storage):
    storage.remove("checkpoints/step-000004/learner.pt")
    assert newest(storage)[0].manifest["step"] == 2


def test_none_whole_is_an_error_not_a_fresh_start(storage):
    for step in (0, 2, 4):
        storage.remove(f"checkpoints/step-{step:06d}/state.json")
    with pytest.raises(CheckpointError, match="not whole"):
        newest(storage)


def test_another_version_is_said_not_passed_over(storage):
    name = "checkpoints/step-000004/state.json"
    storage.write(name, json.dumps({**json.loads(storage.read(name)), "format": 99}).encode())
    with pytest.raises(OtherVersion, match="format 99"):
        newest(storage)


def test_pruning_keeps_the_newest_and_the_evaluated(storage):
    for step in (6, 8):
        checkpoint.save(storage, {"step": step, "next_epoch": step // 2}, FILES)
    checkpoint.prune(storage, 2, {0})
    assert checkpoint.steps(storage) == [0, 6, 8]
    checkpoint.prune(storage, 0, set())
    assert checkpoint.steps(storage) == [0, 6, 8]


def test_latest_points_at_the_newest(tmp_path):
    storage = Storage(str(tmp_path))
    for step in (2, 4):
        checkpoint.save(storage, {"step": step}, FILES)
        assert (tmp_path / "checkpoints/latest/learner.pt").read_bytes() == b"weights"
        assert (tmp_path / "checkpoints/latest").resolve().name == f"step-{step:06d}"
