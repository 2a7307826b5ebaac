"""Local folders and fsspec URLs alike; nothing half-written."""

import errno
import os
from pathlib import Path

import pytest
from pydantic import BaseModel

from records import storage as storage_module
from records.storage import LOCK, Storage, StorageError


class Shape(BaseModel):
    a: int


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    return Storage(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path}/run")


def test_files_and_folders_come_back(storage):
    storage.write("a.txt", b"one")
    storage.write("deep/b.txt", b"two")
    storage.write_folder("folder", {"x": b"1", "sub/y": b"2"})
    assert storage.read("a.txt") == b"one" and storage.read("folder/sub/y") == b"2"
    assert storage.entries() == ["a.txt", "deep", "folder"] and storage.entries("nowhere") == []
    storage.write_folder("folder", {"z": b"3"})
    assert storage.entries("folder") == ["z"]
    storage.remove("folder")
    storage.remove("folder")
    assert not storage.exists("folder") and storage.exists("deep/b.txt")
    # No listing is cached: the MLflow mirror reads, in its own process, what the driver has just written.
    assert storage.local or storage._fs.dircache.use_listings_cache is False


def test_what_is_not_there_or_damaged_is_named(storage):
    refused(storage.read, "missing.txt", said=r"cannot read missing\.txt in .*run")
    refused(Storage, "nosuch://bucket/run", said="nosuch")
    storage.write("lines", b'{"a": 1}\n{"a": 2}\n')
    assert storage.read_json_lines("lines", Shape, "") == [{"a": 1}, {"a": 2}]
    assert storage.read_json_lines("none", Shape, "") == []
    deep, huge = b"[" * 10**6, b'{"a": 1' + b"0" * 5000 + b"}"
    hostile = (deep, "recursion"), (huge, "number out of range"), (b'{"a": NaN}', "a: "), (b'{"a": 1e999}', "a: ")
    damaged = (b"{", "EOF"), (b"3", "valid dictionary"), (b"[]", "valid dictionary"), (b"{}", "a: Field required")
    for content, said in (*damaged, *hostile):
        storage.write("lines", content)
        refused(
            storage.read_json_lines, "lines", Shape, "bake it", said=rf"line 1 of lines in .*run .*{said}.*: bake it"
        )
    storage.write_json("sealed", {"a": 1, "b": float("nan")})
    whole = storage.read("sealed")
    assert storage.read_json("sealed", Shape) == {"a": 1, "b": None}
    storage.write("sealed", whole.replace(b"1", b"2", 1))
    refused(storage.read_json, "sealed", Shape, said="its sha256 differs.*: put it back from a copy")


def test_whoever_removes_the_locks_file_lets_nobody_in(tmp_path):
    storage = Storage(str(tmp_path))
    with storage.lock():
        (tmp_path / LOCK).unlink()
        refused(storage.lock, said="is in use by another process")
        (tmp_path / LOCK).write_text("process 1 on \x1b[2Jmars")
        refused(storage.lock, said="is in use by process 1")
        assert storage.in_use()
    assert not storage.in_use()
    storage.lock().close()


def test_the_name_for_a_log_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(Storage("run")) == str(Storage(f"file://{tmp_path}/run")) == str(tmp_path / "run")
    assert str(Storage("memory://x/run")).startswith("memory://")


@pytest.mark.parametrize("folder", [False, True])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, folder):
    storage = Storage(str(tmp_path / "run"))
    storage.write("file", b"old")
    storage.write_folder("folder", {"x": b"old"})
    real = Path.write_bytes

    def fails(path, content):
        real(path, content[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fails)
    with pytest.raises(StorageError, match="no space left"):
        storage.write_folder("folder", {"x": b"new"}) if folder else storage.write("file", b"new")
    assert storage.read("file") == b"old" and storage.read("folder/x") == b"old"
    assert not [path for path in (tmp_path / "run").rglob(".*")]


def test_whatever_an_object_store_raises_is_a_storage_error(tmp_path, monkeypatch):
    storage = Storage(f"memory://{tmp_path}/run")

    def fails(*_, **__):
        raise LookupError("unable to locate credentials")

    for name in ("pipe_file", "cat_file", "exists", "ls"):
        monkeypatch.setattr(storage._fs, name, fails)
    for call, *content in ((storage.write, b""), (storage.read,), (storage.exists,), (storage.entries,)):
        refused(call, "a", *content, said="LookupError: unable to locate")


def refused(call, *arguments, said="leads out of the folder"):
    with pytest.raises(StorageError, match=said):
        call(*arguments)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..", "a\0b"])
def test_no_name_leads_out(storage, name):
    outside = Storage(str(storage).removesuffix("/run"))
    outside.write("secret", b"secret")
    storage.write("a/file", b"")
    for call in (storage.read, storage.exists, storage.entries, storage.remove):
        refused(call, name)
    refused(storage.write, name, b"changed")
    refused(storage.write_folder, name, {})
    refused(storage.write_folder, "folder", {name: b"changed"})
    assert outside.read("secret") == b"secret" and storage.exists("a/file") and not storage.exists("folder")


def test_no_link_leads_out_and_those_within_and_to_the_folder_itself_are_fine(tmp_path):
    storage = Storage(str(tmp_path / "run"))
    storage.write("file", b"")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/one").write_bytes(b"secret")
    (tmp_path / "run/folder").symlink_to(tmp_path / "secrets")
    (tmp_path / "run/one").symlink_to(tmp_path / "secrets/one")
    said = r"a link that leads out of .*run: put the files themselves there"
    refused(storage.read, "one", said=said)
    refused(storage.read, "folder/one", said=said)
    refused(storage.entries, "folder", said=said)
    refused(storage.write, "folder/two", b"", said=said)
    refused(storage.write_folder, "folder/two", {"x": b""}, said=said)
    refused(storage.remove, "folder/one", said=said)
    storage.write("one", b"own")  # a link is replaced
    storage.remove("folder")
    assert storage.read("one") == b"own" and storage.entries() == ["file", "one"]
    assert (tmp_path / "secrets/one").read_bytes() == b"secret" and len(list((tmp_path / "secrets").iterdir())) == 1
    (tmp_path / "disk").mkdir()
    (tmp_path / "to-disk").symlink_to(tmp_path / "disk")
    storage = Storage(str(tmp_path / "to-disk"))
    storage.write_folder("step-1", {"file": b"held"})
    (tmp_path / "disk/latest").symlink_to("step-1")
    assert storage.read("latest/file") == b"held" and storage.entries("latest") == ["file"]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write_folder("checkpoints/step-000002", {"state.json": b"{}"})
    storage.write("metrics.jsonl", b"one\n")
    (tmp_path / "checkpoints/.step-000000.tributary-old/lora").mkdir(parents=True)
    (tmp_path / "checkpoints/.step-000004.tributary-new").mkdir()
    (tmp_path / "checkpoints/.latest.tributary-new").symlink_to("step-000002")
    (tmp_path / ".metrics.jsonl.tributary-new").write_bytes(b"half a li")
    (tmp_path / ".mine").write_bytes(b"")
    (tmp_path / ".mine.old").write_bytes(b"")
    storage.tidy()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    kept = ["checkpoints", "checkpoints/step-000002", "checkpoints/step-000002/state.json"]
    assert left == [".mine", ".mine.old", *kept, "metrics.jsonl"]


def test_all_of_a_folder_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """A machine that loses power must not find a checkpoint's name over files that were never written."""
    storage, events = Storage(str(tmp_path)), []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(handle):
        events.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        real_sync(handle)

    def rename(path, target):
        events.append(("rename", str(path)))
        return real_replace(path, target)

    monkeypatch.setattr(storage_module.os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    storage.write_folder("step-1", {"lora/weights": b"1", "manifest.json": b"2"})
    aside = tmp_path / ".step-1.tributary-new"
    named = events.index(("rename", str(aside)))
    before = [path for kind, path in events[:named] if kind == "sync"]
    assert sorted(before) == [str(aside / name) for name in ("", "lora", "lora/weights", "manifest.json")]
    assert events[named + 1 :] == [("sync", str(tmp_path))]
