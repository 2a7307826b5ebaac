"""Export folders appear in one piece, replace their own kind, and nothing else."""

import json
import os

import pytest
from reports.export_folder import MANIFEST, FolderTaken, new_folder

from records.storage import Storage, StorageError


def write(out, content="first") -> None:
    with new_folder(str(out), {"step": "2"}) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_text(content)
        (folder / "README.md").write_text("card")
        (folder / "README.md").chmod(0o600)


@pytest.fixture
def out(tmp_path):
    write(tmp_path / "deep" / "out")
    return tmp_path / "deep" / "out"


def test_it_is_there_with_its_manifest_and_may_be_replaced(out):
    about = json.loads((out / MANIFEST).read_text())
    assert about["step"] == "2" and set(about["files"]) == {"README.md", "unet/weights"}
    mask = os.umask(0)
    os.umask(mask)
    assert (out / "README.md").stat().st_mode & 0o777 == 0o666 & ~mask
    (out / "README.md").unlink()  # less than was written is nobody's loss
    write(out, "second")
    assert (out / "unet" / "weights").read_text() == "second" and (out / "README.md").exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_empty_folder_will_do_and_a_link_stays_one(out, tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    (tmp_path / "link").symlink_to(out, target_is_directory=True)
    write(tmp_path / "link", "second")
    assert (tmp_path / "link").is_symlink() and (out / "unet" / "weights").read_text() == "second"


@pytest.mark.parametrize("name", ["README.md", "notes.txt", "unet/.hidden"])
def test_what_others_wrote_stays(out, name):
    (out / name).write_text("mine")
    with pytest.raises(FolderTaken, match=f"holds {name}, which is not as an export wrote it: give another --out"):
        write(out, "second")
    assert (out / name).read_text() == "mine" and (out / "unet" / "weights").read_text() == "first"


@pytest.mark.parametrize("manifest", [None, "[]", "{", '{"files": []}', '{"files": {}}'])
def test_without_a_manifest_it_is_somebodys(out, manifest):
    (out / MANIFEST).unlink()
    if manifest:
        (out / MANIFEST).write_text(manifest)
    with pytest.raises(FolderTaken):
        write(out)
    assert (out / "README.md").exists()


def test_what_comes_meanwhile_stays_too(tmp_path):
    with pytest.raises(FolderTaken), new_folder(str(tmp_path / "out"), {}) as folder:
        (folder / "README.md").write_text("card")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_or_a_failure_leaves_all_as_it_was(out, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FolderTaken, match="is a file"):
        write(tmp_path / "file")
    with pytest.raises(RuntimeError), new_folder(str(out), {}) as folder:
        (folder / "README.md").write_text("half")
        raise RuntimeError
    assert (out / "README.md").read_text() == "card" and [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_rename_that_fails_brings_the_old_one_back(out, monkeypatch):
    rename = os.rename

    def fail(source, target, **options):
        if str(source).endswith(".new"):
            raise OSError(5, "input/output error")
        return rename(source, target, **options)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="input/output"):
        write(out, "second")
    assert (out / "unet" / "weights").read_text() == "first" and [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_object_store_gets_the_manifest_last(tmp_path, monkeypatch):
    url = f"memory://{tmp_path.name}/out"
    write(url)
    write(url, "second")
    storage = Storage(url)
    assert storage.read("unet/weights") == b"second" and storage.entries() == ["README.md", MANIFEST, "unet"]
    named = []
    original = Storage.write

    def record(self, name, content):
        if name == MANIFEST:
            raise StorageError("gone")
        named.append(name)
        original(self, name, content)

    monkeypatch.setattr(Storage, "write", record)
    with pytest.raises(StorageError):
        write(url, "third")
    assert named == ["README.md", "unet/weights"]
    monkeypatch.undo()
    with pytest.raises(FolderTaken, match=r"README\.md"):  # not whole: somebody has to look
        write(url)
