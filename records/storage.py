"""Where a run's files live: a local or mounted folder, or any fsspec URL (s3://, gs://, ...). Only the driver writes.

A reader never sees half a file: locally it is written aside, synced and renamed; an object store's put is atomic.
A folder is written in one piece too: locally aside and renamed; on an object store its last file (the manifest, which
`records/checkpoint.py` writes last) says that it is whole.

Names may come from files that someone else wrote (a checkpoint's manifest), so none leads out of the root.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import fsspec

from diffusion.failures import RunFailure

ASIDE, GONE = ".new", ".old"


class StorageError(RunFailure, OSError):
    """A file that could not be written or read; the message names it and the remedy."""


class Storage:
    """Files under one root, named by relative paths with forward slashes. Every method refuses, with a StorageError, a
    name that leads out of the root: absolute, with `..`, or through a link."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            StorageError: no such protocol here.
        """
        try:
            # No listings cache: the mirror reads what another process, the driver, is writing.
            self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StorageError(f"cannot open {url}: {error}") from error
        self.local = Path(self._root) if "file" in _protocols(self._fs) else None

    def __str__(self) -> str:
        """The absolute path or URL: what a log says."""
        return str(self.local) if self.local else self._fs.unstrip_protocol(self._root)

    def write(self, name: str, content: bytes) -> None:
        """
        Raises:
            StorageError: the disk is full, read-only, gone ...
        """
        with self._saying("write", name):
            if self.local is None:
                self._fs.pipe_file(self._at(name), content)
                return
            target = self._place(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{target.name}{ASIDE}")
            try:
                _write_synced(aside, content)
                aside.replace(target)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
            _sync_folder(target.parent)

    def write_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        """All or nothing (see the module's docstring); an older folder of that name is replaced.

        Raises:
            StorageError: as write.
        """
        for file in files:
            _require_within(file)
        if self.local is None:
            self.remove(name)
            for file, content in files.items():
                self.write(f"{name}/{file}", content)
            return
        target = self._place(name)
        aside = target.with_name(f".{target.name}{ASIDE}")
        with self._saying("write", name):
            shutil.rmtree(aside, ignore_errors=True)
            try:
                for file, content in files.items():
                    (aside / file).parent.mkdir(parents=True, exist_ok=True)
                    _write_synced(aside / file, content)
                for folder in {(aside / file).parent for file in files} | {aside}:
                    _sync_folder(folder)
                self.remove(name)
                aside.rename(target)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise
            _sync_folder(target.parent)

    def read(self, name: str) -> bytes:
        """
        Raises:
            StorageError: it is not there, or cannot be read.
        """
        with self._saying("read", name):
            return self._fs.cat_file(self._at(name))

    def exists(self, name: str) -> bool:
        with self._saying("look for", name):
            return bool(self._fs.exists(self._at(name)))

    def entries(self, name: str = "") -> list[str]:
        """Names (without the folder's) of what lies in a folder, sorted; hidden ones are left out."""
        with self._saying("list", name):
            try:
                found = self._fs.ls(self._at(name), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in found)
        return sorted(entry for entry in names if not entry.startswith("."))

    def remove(self, name: str) -> None:
        """A file or a folder with all in it; nothing happens where there is none."""
        with self._saying("remove", name):
            if self.local is None:
                if self._fs.exists(self._at(name)):
                    self._fs.rm(self._at(name), recursive=True)
                return
            target = self._place(name)
            if not target.is_dir() or target.is_symlink():
                target.unlink(missing_ok=True)
                return
            gone = target.with_name(f".{target.name}{GONE}")  # at once: a reader never sees half a folder
            shutil.rmtree(gone, ignore_errors=True)
            target.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def tidy(self) -> None:
        """Remove what a killed writer left half written or half removed. For the one process that may write here.

        Raises:
            StorageError: it cannot be removed.
        """
        if self.local is None:
            return
        with self._saying("tidy", "what was left"):
            for path in [path for path in self.local.rglob(".*") if path.name.endswith((ASIDE, GONE))]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)

    def _at(self, name: str) -> str:
        """Where to read."""
        _require_within(name)
        if self.local:
            self._require_no_way_out(self.local / name)
        return f"{self._root}/{name}" if name else self._root

    def _place(self, name: str) -> Path:
        """Where to write or remove in a local folder: a link is replaced, not followed."""
        assert self.local is not None
        _require_within(name)
        self._require_no_way_out((self.local / name).parent)
        return self.local / name

    def _require_no_way_out(self, path: Path) -> None:
        assert self.local is not None
        if not path.resolve().is_relative_to(self.local.resolve()):
            raise StorageError(f"{path} is a link that leads out of {self}: put the files themselves there")

    @contextlib.contextmanager
    def _saying(self, verb: str, name: str) -> Iterator[None]:
        """Turn whatever the storage raises (each object store has exceptions of its own) into a StorageError."""
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                reason = "no space left on it; free some and give the same command again"
            else:
                reason = error.strerror or str(error)
            raise StorageError(f"cannot {verb} {name} in {self}: {reason}") from error
        except Exception as error:
            if self.local is not None:
                raise
            raise StorageError(f"cannot {verb} {name} in {self}: {type(error).__name__}: {error}") from error


def _require_within(name: str) -> None:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise StorageError(f"{name!r} is no name of a file in here: it leads out of the folder")


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make a rename durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
