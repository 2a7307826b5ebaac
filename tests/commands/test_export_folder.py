"""Export folders appear in one piece, replace their own kind, and nothing else."""

import json
import os

import pytest

from commands.export import MANIFEST, CannotExport, write
from records.storage import Storage, StorageError

ABOUT = {"step": "2"}


def content(weights="first") -> dict[str, bytes]:
    return {"README.md": b"card", "unet/weights": weights.encode()}


@pytest.fixture
def out(tmp_path):
    write(str(tmp_path / "deep" / "out"), content(), ABOUT)
    return tmp_path / "deep" / "out"


def test_it_is_there_with_its_manifest_and_may_be_replaced(out):
    about = json.loads((out / MANIFEST).read_text())
    assert about["step"] == "2" and set(about["files"]) == {"README.md", "unet/weights"}
    mask = os.umask(0)
    os.umask(mask)
    assert (out / "README.md").stat().st_mode & 0o777 == 0o666 & ~mask
    (out / "README.md").unlink()  # less than was written is nobody's loss
    write(str(out), content("second"), ABOUT)
    assert (out / "unet" / "weights").read_text() == "second" and (out / "README.md").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_will_do_and_a_link_stays_one(out, tmp_path):
    (tmp_path / "empty").mkdir()
    write(str(tmp_path / "empty"), content(), ABOUT)
    (tmp_path / "link").symlink_to(out, target_is_directory=True)
    write(str(tmp_path / "link"), content("second"), ABOUT)
    assert (tmp_path / "link").is_symlink() and (out / "unet" / "weights").read_text() == "second"


@pytest.mark.parametrize("name", ["README.md", "notes.txt", "unet/.hidden"])
def test_what_others_wrote_stays(out, name):
    (out / name).write_text("mine")
    with pytest.raises(CannotExport, match=f"holds {name}, which is not as an export wrote it: give another --out"):
        write(str(out), content("second"), ABOUT)
    assert (out / name).read_text() == "mine" and (out / "unet" / "weights").read_text() == "first"


@pytest.mark.parametrize("manifest", [None, "[]", "{", '{"files": []}', '{"files": {}}'])
def test_without_a_manifest_it_is_somebodys(out, manifest):
    (out / MANIFEST).unlink()
    if manifest:
        (out / MANIFEST).write_text(manifest)
    with pytest.raises(CannotExport):
        write(str(out), content(), ABOUT)
    assert (out / "README.md").exists()


def test_a_file_or_a_failure_leaves_all_as_it_was(out, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CannotExport, match="is a file"):
        write(str(tmp_path / "file"), content(), ABOUT)

    def fail(*arguments):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="no space left"):
        write(str(out), content("second"), ABOUT)
    assert (out / "unet" / "weights").read_text() == "first" and [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_object_store_gets_the_manifest_last(tmp_path, monkeypatch):
    url = f"memory://{tmp_path.name}/out"
    write(url, content(), ABOUT)
    write(url, content("second"), ABOUT)
    storage = Storage(url)
    assert storage.read("unet/weights") == b"second" and storage.entries() == ["README.md", MANIFEST, "unet"]
    named = []
    original = Storage.write

    def record(self, name, content):
        if name.endswith(MANIFEST):
            raise StorageError("gone")
        named.append(name)
        original(self, name, content)

    monkeypatch.setattr(Storage, "write", record)
    with pytest.raises(StorageError):
        write(url, content("third"), ABOUT)
    assert named == ["out/README.md", "out/unet/weights"]
    monkeypatch.undo()
    with pytest.raises(CannotExport, match=r"README\.md"):  # not whole: somebody has to look
        write(url, content(), ABOUT)
