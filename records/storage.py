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
from fsspec.implementations.local import LocalFileSystem

from diffusion.failures import RunFailure

ASIDE, GONE = ".new", ".old"


class StorageError(RunFailure, OSError):
    """A file that could not be written or read; the message names it and the remedy."""


class Storage:
    """Files under one root, named by relative paths with forward slashes. Every method raises a StorageError where it
    fails (the disk is full, read-only, gone ...), and for a name that leads out of the root: absolute, with `..`, or
    through a link."""

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
        self.local = Path(self._root) if isinstance(self._fs, LocalFileSystem) else None

    def __str__(self) -> str:
        """The absolute path or URL: what a log says."""
        return str(self.local) if self.local else self._fs.unstrip_protocol(self._root)

    def write(self, name: str, content: bytes) -> None:
        with self._errors("write", name):
            if self.local is None:
                self._fs.pipe_file(self._path(name), content)
                return
            with self._aside(name) as aside:
                _write_synced(aside, content)

    def write_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        """All or nothing (see the module's docstring); an older folder of that name is replaced."""
        for file in files:
            _require_within(file)
        if self.local is None:
            self.remove(name)
            for file, content in files.items():
                self.write(f"{name}/{file}", content)
            return
        with self._errors("write", name), self._aside(name) as aside:
            for file, content in files.items():
                (aside / file).parent.mkdir(parents=True, exist_ok=True)
                _write_synced(aside / file, content)
            for folder in {(aside / file).parent for file in files} | {aside}:
                _sync(folder)
            self.remove(name)

    def read(self, name: str) -> bytes:
        with self._errors("read", name):
            return self._fs.cat_file(self._path(name))

    def exists(self, name: str) -> bool:
        with self._errors("look for", name):
            return bool(self._fs.exists(self._path(name)))

    def entries(self, name: str = "") -> list[str]:
        """Names (without the folder's) of what lies in a folder, sorted; hidden ones are left out."""
        with self._errors("list", name):
            try:
                paths = self._fs.ls(self._path(name), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in paths)
        return sorted(entry for entry in names if not entry.startswith("."))

    def remove(self, name: str) -> None:
        """A file or a folder with all in it; nothing happens where there is none."""
        with self._errors("remove", name):
            if self.local is None:
                if self._fs.exists(self._path(name)):
                    self._fs.rm(self._path(name), recursive=True)
                return
            target = self._target(name)
            if target.is_dir() and not target.is_symlink():  # away at once: a reader never sees half a folder
                gone = target.with_name(f".{target.name}{GONE}")
                _delete(gone)
                target = target.rename(gone)
            _delete(target)

    def tidy(self) -> None:
        """Remove what a killed writer left half written or half removed. For the one process that may write here."""
        with self._errors("tidy", "what was left"):
            for path in list(self.local.rglob(".*")) if self.local else ():
                if path.name.endswith((ASIDE, GONE)):
                    _delete(path)

    def _path(self, name: str) -> str:
        """Where to read."""
        _require_within(name)
        if self.local:
            self._require_inside(self.local / name)
        return f"{self._root}/{name}" if name else self._root

    def _target(self, name: str) -> Path:
        """Where to write or remove in a local folder: a link is replaced, not followed."""
        assert self.local is not None
        _require_within(name)
        self._require_inside((self.local / name).parent)
        return self.local / name

    def _require_inside(self, path: Path) -> None:
        if self.local and not path.resolve().is_relative_to(self.local.resolve()):
            raise StorageError(f"{path} is a link that leads out of {self}: put the files themselves there")

    @contextlib.contextmanager
    def _aside(self, name: str) -> Iterator[Path]:
        """The path to write a local file or folder to; what is written there takes its name in the end."""
        target = self._target(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}{ASIDE}")
        _delete(aside)
        try:
            yield aside
            aside.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                _delete(aside)
            raise
        _sync(target.parent)

    @contextlib.contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        """Turn whatever the storage raises (each object store has exceptions of its own) into a StorageError."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            if isinstance(error, OSError):
                reason = error.strerror or str(error)
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    reason = "no space left on it; free some and give the same command again"
            elif self.local:
                raise
            else:
                reason = f"{type(error).__name__}: {error}"
            raise StorageError(f"cannot {verb} {name} in {self}: {reason}") from error


def _require_within(name: str) -> None:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise StorageError(f"{name!r} is no name of a file in here: it leads out of the folder")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_synced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    """A file's content, or a folder's names, on the disk for good."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
