import json
import shutil
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest

from records import checkpoint
from records.checkpoint import CheckpointError
from records.storage import Storage

FILES = {"learner.pt": b"weights", "lora/kohya.safetensors": b"adapter"}
SUMS = {file: sha256(content).hexdigest() for file, content in FILES.items()}
RUN = "this run"
NEWEST = "checkpoints/step-000004"


def about(step, run_id=RUN):
    sizes, ledger = {"chunk": 4}, {"epochs": step // 2, "totals": {}}
    known = {"policy_version": 0, "adapter_sha256": "", "ranks": 1, "batch_sizes": sizes, "ledger": ledger}
    return {"run_id": run_id, "step": step, "next_epoch": step // 2, **known}


def save(storage, step, files=FILES, run_id=RUN):
    checkpoint.save(storage, about(step, run_id), files)


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    storage = Storage(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path}/run")
    for step in (0, 2, 4):
        save(storage, step)
    return storage


def newest(storage):
    warnings = []
    return checkpoint.load_newest(storage, RUN, warnings.append), warnings


def assert_passed_over(storage):
    loaded, warnings = newest(storage)
    assert loaded.manifest["step"] == 2 and loaded.files == FILES
    assert len(warnings) == 1 and "step-000004" in warnings[0]


def test_the_newest_comes_back_with_what_its_manifest_names(storage):
    storage.write(f"{NEWEST}/replay-7.pt", b"slipped in")
    loaded, warnings = newest(storage)
    assert loaded.name == NEWEST and loaded.files == FILES and loaded.manifest["next_epoch"] == 2 and not warnings
    assert newest(Storage(f"{storage}/empty")) == (None, [])


@pytest.mark.parametrize("file", [*FILES, "state.json"])
def test_a_file_that_is_cut_short_missing_or_has_a_flipped_bit_anywhere_is_passed_over(storage, file):
    name = f"{NEWEST}/{file}"
    whole = storage.read(name)
    write = (storage.local / name).write_bytes if storage.local else partial(storage.write, name)  # without fsync
    write(whole[:-3])
    assert_passed_over(storage)
    for place in range(len(whole)):
        write(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        assert_passed_over(storage)
    storage.remove(name)
    assert_passed_over(storage)


EDITED_FILES = ({}, {"learner.pt": SUMS["learner.pt"]}, {**SUMS, "more": ""}, ["learner.pt"])


EDITED = ({"next_epoch": 1}, {"sha256": ""}, {"format": 1}, *({"files": files} for files in EDITED_FILES))


@pytest.mark.parametrize("changes", EDITED)
def test_an_edited_manifest_or_that_of_another_run_or_step_is_passed_over(storage, changes):
    edited = json.loads(storage.read(f"{NEWEST}/state.json")) | changes
    storage.write(f"{NEWEST}/state.json", json.dumps(edited, indent=1).encode())
    assert_passed_over(storage)
    other = Storage(f"{storage}/other")
    save(other, 4, run_id="another run")
    storage.write(f"{NEWEST}/state.json", other.read(f"{NEWEST}/state.json"))
    assert_passed_over(storage)
    storage.write(f"{NEWEST}/state.json", storage.read("checkpoints/step-000002/state.json"))
    assert_passed_over(storage)


@pytest.mark.parametrize("name", ["../../../secret", "../../step-000002/learner.pt", "{root}/secret", "a/../../x"])
def test_a_manifest_that_names_files_elsewhere_is_passed_over(storage, tmp_path, name):
    """As someone would write it who knows how manifests are sealed."""
    (tmp_path / "secret").write_bytes(b"secret")
    name = name.format(root=tmp_path)
    sums = {**SUMS, name: sha256(b"secret").hexdigest()}
    storage.write_json(f"{NEWEST}/state.json", {"format": checkpoint.FORMAT, **about(4), "files": sums})
    assert_passed_over(storage)


@pytest.mark.parametrize("linked", ["learner.pt", "lora", ""])
def test_a_checkpoint_with_a_link_to_elsewhere_is_passed_over(tmp_path, linked):
    storage = Storage(str(tmp_path / "run"))
    for step in (2, 4):
        save(storage, step)
    moved, place = tmp_path / "moved", tmp_path / "run" / NEWEST / linked
    place.rename(moved)
    place.symlink_to(moved)
    assert_passed_over(storage)
    checkpoint.drop_after(storage, 2, {0, 2, 4})
    assert moved.exists() and checkpoint.steps(storage) == [2]


@pytest.mark.parametrize("sealed", [False, True])
def test_checkpoints_of_another_format_are_said_and_none_whole_is_an_error_not_a_fresh_start(storage, sealed):
    for step in (0, 2, 4):
        name = f"checkpoints/step-{step:06d}/state.json"
        about = {**json.loads(storage.read(name)), "format": 4}
        del about["sha256"]
        storage.write_json(name, about) if sealed else storage.write(name, json.dumps(about).encode())
    with pytest.raises(CheckpointError, match="is of format 4, this Tributary reads 6: use the version that wrote it"):
        newest(storage)
    for step in (0, 2, 4):
        storage.remove(f"checkpoints/step-{step:06d}/state.json")
    with pytest.raises(CheckpointError, match="not whole"):
        newest(storage)


def prune(storage, keep, always=(), named=(0, 2, 4, 6, 8)):
    """The steps that are left, and the warnings."""
    warnings = []
    checkpoint.prune(storage, keep, set(always), set(named), RUN, warnings.append)
    return checkpoint.steps(storage), warnings


def test_pruning_keeps_the_newest_and_the_evaluated(storage):
    save(storage, 6)
    assert prune(storage, 2, {0}) == prune(storage, 0) == ([0, 4, 6], [])


def test_what_the_runs_records_do_not_name_is_never_removed(storage):
    save(storage, 6)
    assert prune(storage, 1, named=(0, 4, 6)) == ([2, 6], [])
    with pytest.raises(CheckpointError, match="step-000006 is not this run's: its records name no such step; move it"):
        checkpoint.drop_after(storage, 2, {0, 2, 4})
    assert checkpoint.steps(storage) == [2, 6]


def test_a_copied_runs_latest_is_replaced_and_somebody_elses_folder_of_that_name_stays(tmp_path):
    storage = Storage(str(tmp_path))
    save(storage, 2)
    latest = tmp_path / "checkpoints/latest"
    latest.unlink()
    shutil.copytree(tmp_path / "checkpoints/step-000002", latest)
    save(storage, 4)
    assert latest.readlink() == Path("step-000004")
    latest.unlink()
    latest.mkdir()
    (latest / "mine").touch()
    save(storage, 6)
    assert (latest / "mine").exists()


def test_pruning_never_takes_the_last_whole_one(storage):
    """The newest two, all that would be kept, are torn on the disk."""
    for step in (6, 8):
        save(storage, step)
        storage.write(f"checkpoints/step-{step:06d}/learner.pt", b"torn")
    left, (of_8, of_6) = prune(storage, 2)
    assert left == [4, 6, 8] and "step-000008" in of_8 and "step-000006" in of_6
    assert newest(storage)[0].name == NEWEST
    for step in (0, 2, 4):
        storage.remove(f"checkpoints/step-{step:06d}/learner.pt")
    with pytest.raises(CheckpointError, match="not whole"):
        prune(storage, 1)
    assert checkpoint.steps(storage) == [4, 6, 8]  # none is whole: none goes


def test_a_checkpoint_as_format_6_first_had_it_is_read(storage):
    """Bytes that an earlier version of this code wrote."""
    begin = b'{\n "format": 6,\n "run_id": "this run",\n "step": 4,\n "next_epoch": 2,\n'
    begin += b' "policy_version": 2,\n "adapter_sha256": "a",\n "ranks": 1,\n "batch_sizes": {\n  "chunk": 4\n },\n'
    begin += b' "ledger": {\n  "epochs": 2,\n  "totals": {\n   "lost": 0\n  }\n },\n'
    files = b' "files": {\n  "learner.pt": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"\n },\n'
    seal = b' "sha256": "ae3aa42a07c3216891fd89a5e13e0a90f6869da4de74be8350de1266983bd824"\n}\n'
    storage.write_folder(NEWEST, {"learner.pt": b"weights", "state.json": begin + files + seal})
    loaded, warnings = newest(storage)
    assert loaded.name == NEWEST and loaded.files == {"learner.pt": b"weights"} and not warnings
    assert loaded.manifest["batch_sizes"] == {"chunk": 4}


def test_latest_points_at_the_newest(tmp_path):
    storage = Storage(str(tmp_path))
    for step in (2, 4):
        save(storage, step)
        assert (tmp_path / "checkpoints/latest/learner.pt").read_bytes() == b"weights"
        assert (tmp_path / "checkpoints/latest").resolve().name == f"step-{step:06d}"
