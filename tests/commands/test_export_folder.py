"""Export folders appear in one piece, replace their own kind, and nothing else."""

import json
import os
from unittest.mock import Mock

import pytest

from commands.export import MANIFEST, write
from records.storage import Storage, StorageError


def content(weights="first") -> dict[str, bytes]:
    return {"README.md": b"card", "unet/weights": weights.encode()}


@pytest.fixture
def out(tmp_path):
    write(str(tmp_path / "deep" / "out"), content(), {"step": "2"})
    return tmp_path / "deep" / "out"


def test_it_is_there_with_its_manifest_and_may_be_replaced(out, tmp_path):
    about = json.loads((out / MANIFEST).read_text())
    assert about["step"] == "2" and set(about["files"]) == {"README.md", "unet/weights"}
    mask = os.umask(0)
    os.umask(mask)
    assert (out / "README.md").stat().st_mode & 0o777 == 0o666 & ~mask
    (out / "README.md").unlink()  # less than was written is nobody's loss
    (tmp_path / "link").symlink_to(out, target_is_directory=True)
    write(str(tmp_path / "link"), content("second"), {})
    assert (tmp_path / "link").is_symlink() and (out / "unet" / "weights").read_text() == "second"
    assert (out / "README.md").exists() and [path.name for path in out.parent.iterdir()] == ["out"]
    (tmp_path / "empty").mkdir()
    write(str(tmp_path / "empty"), content(), {})


def test_what_others_wrote_stays_and_without_a_whole_manifest_all_is_somebodys(out):
    for name in ("unet/.hidden", "notes.txt", "README.md"):
        before = (out / name).read_bytes() if (out / name).exists() else None
        (out / name).write_text("mine")
        with pytest.raises(ValueError, match=f"holds {name}, which is not as an export wrote it: give another --out"):
            write(str(out), content("second"), {})
        assert (out / name).read_text() == "mine" and (out / "unet" / "weights").read_text() == "first"
        (out / name).write_bytes(before) if before else (out / name).unlink()
    for manifest in ("[]", "{", '{"files": []}', '{"files": {}}', ""):
        (out / MANIFEST).write_text(manifest)
        with pytest.raises(ValueError, match="not as an export wrote it"):
            write(str(out), content(), {})
    assert (out / "README.md").exists()


def test_a_file_or_a_failure_leaves_all_as_it_was(out, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="holds file, which is not"):
        write(str(tmp_path / "file"), content(), {})

    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "no space left on device")))
    with pytest.raises(StorageError, match="no space left"):
        write(str(out), content("second"), {})
    assert (out / "unet" / "weights").read_text() == "first" and [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_object_store_gets_the_manifest_last(tmp_path, monkeypatch):
    url = f"memory://{tmp_path.name}/out"
    write(url, content(), {})
    write(url, content("second"), {})
    storage = Storage(url)
    assert storage.read("unet/weights") == b"second" and storage.entries() == ["README.md", MANIFEST, "unet"]
    original = Storage.write

    def record(self, name, content):
        if name.endswith(MANIFEST):
            raise StorageError("gone")
        original(self, name, content)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "write", record)
        with pytest.raises(StorageError):
            write(url, content("third"), {})
    assert storage.entries() == ["README.md", "unet"]
    with pytest.raises(ValueError, match=r"README\.md"):  # not whole: somebody has to look
        write(url, content(), {})
