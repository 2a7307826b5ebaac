"""Where a run's files live: a local or mounted folder, or any fsspec URL (s3://, gs://, ...). Only the driver writes.
A reader never sees half a file or folder: locally it is written aside, synced and renamed. An object store's put is
atomic, and a folder's last file (a checkpoint's manifest) says that it is whole. Names may come from files that someone
else wrote (that manifest), so none leads out of the root."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock, Timeout
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json, to_json

from diffusion.failures import RunFailure

ASIDE, GONE = ".tributary-new", ".tributary-old"  # of names that nobody else gives
LOCK = "run.lock"  # names the process that last wrote the run
SEAL = "sha256"  # in a JSON file: of the rest of it


class StorageError(RunFailure, OSError):
    """A file that could not be written or read, or is damaged; the message names it and the remedy."""


class Storage:
    """Files under one root, named by relative paths with forward slashes. Every method raises a StorageError where it
    fails (the disk is full, read-only, gone ...), and for a name that leads out of the root: absolute, with `..`, or
    through a link."""

    def __init__(self, url: str) -> None:
        try:
            # No listings cache: the mirror reads what another process, the driver, is writing.
            self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StorageError(f"cannot open {url}: {error}") from error
        self.local = Path(self._root) if isinstance(self._fs, LocalFileSystem) else None

    def __str__(self) -> str:  # the absolute path or URL
        return str(self.local) if self.local else self._fs.unstrip_protocol(self._root)

    def lock(self) -> contextlib.ExitStack:
        """One process writes a run: make and lock its local folder until this is closed, or find it in use. The kernel
        drops the lock with the process. Object stores have none. The folder itself is locked too, where its file system
        can: whoever removes the lock's file lets nobody in."""
        held = contextlib.ExitStack()
        if self.local is None:
            return held
        file = self.local / LOCK
        with self._errors("write", LOCK), held:
            self.local.mkdir(parents=True, exist_ok=True)
            try:
                held.callback(os.close, _locked(self.local))
                held.enter_context(FileLock(file, blocking=False, mode=0o644, fallback_to_soft=False))
            except (Timeout, BlockingIOError):
                owner = file.read_text(errors="replace").strip() if file.exists() else "another process"
                raise StorageError(f"{self} is in use by {owner:.100}; wait for it, or choose another") from None
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
            held = held.pop_all()
        return held

    def in_use(self) -> bool:
        """Whether a process has the lock."""
        if self.local is None or not (self.local / LOCK).exists():
            return False
        try:
            os.close(_locked(self.local))
            with FileLock(self.local / LOCK, blocking=False, fallback_to_soft=False):
                return False
        except (Timeout, OSError):
            return True

    def write(self, name: str, content: bytes) -> None:
        if self.local:
            return self.write_folder(name, {"": content})
        with self._errors("write", name):
            self._fs.pipe_file(self._path(name), content)

    def write_json(self, name: str, value: Any) -> None:
        """Sealed, with null for non-finite numbers."""
        self.write(name, sealed(value))

    def write_folder(self, name: str, files: Mapping[str, bytes]) -> None:
        """All or nothing (see the module's docstring); an older folder of that name is replaced. Locally a file is a
        folder's only one, named ""."""
        for file in files:
            _require_within(file)
        if not self.local:
            self.remove(name)
            for file, content in files.items():
                self.write(f"{name}/{file}", content)
            return
        with self._errors("write", name), contextlib.ExitStack() as undo:
            target = Path(self._path(name, followed=False))
            aside = _beside(target, ASIDE)
            _delete(aside)
            undo.callback(_delete, aside)
            for file, content in files.items():
                (aside / file).parent.mkdir(parents=True, exist_ok=True)
                (aside / file).write_bytes(content)
            for path in (*aside.rglob("*"), aside):
                _sync(path)
            if aside.is_dir():
                self.remove(name)
            aside.replace(target)
            _sync(target.parent)

    def link(self, name: str, target: str) -> bool:
        """Point the local link `name` at `target` beside it. A convenience for people: some file systems have no links,
        and a folder of that name stays. Whether it points there."""
        with contextlib.suppress(OSError):
            link = Path(self._path(name, followed=False))
            aside = _beside(link, ASIDE)
            _delete(aside)
            aside.symlink_to(target)
            try:
                aside.replace(link)
            finally:
                _delete(aside)
            return True
        return False

    def read(self, name: str) -> bytes:
        with self._errors("read", name):
            return self._fs.cat_file(self._path(name))

    def read_json(self, name: str, shape: type[BaseModel], remedy: str = "put it back from a copy") -> dict[str, Any]:
        """An object of this shape, whole if it is sealed. A StorageError names the remedy."""
        return self._object(name, self.read(name), shape, remedy)

    def read_json_lines(self, name: str, shape: type[BaseModel], remedy: str) -> list[dict[str, Any]]:
        """One a line; none where there is no such file."""
        lines = self.read(name).splitlines() if self.exists(name) else []
        return [self._object(f"line {n} of {name}", line, shape, remedy) for n, line in enumerate(lines, 1)]

    def exists(self, name: str) -> bool:
        with self._errors("look for", name):
            return bool(self._fs.exists(self._path(name)))

    def strangers(self) -> list[str]:
        """Names in the root, hidden ones too, but of what locking and killed writers leave."""
        with self._errors("list", ""):
            names = os.listdir(self.local) if self.local and self.local.exists() else self.entries()
            locked = (
                self.local is not None and LOCK in names and (self.local / LOCK).read_text()[:8] in ("", "process ")
            )
        return sorted(name for name in names if not name.endswith((ASIDE, GONE)) and not (locked and name == LOCK))

    def entries(self, name: str = "") -> list[str]:
        """Names (without the folder's) of what lies in a folder, sorted; hidden ones are left out."""
        with self._errors("list", name):
            try:
                paths = self._fs.ls(self._path(name), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        names = (os.path.basename(path.rstrip("/")) for path in paths)
        return sorted(entry for entry in names if not entry.startswith("."))

    def remove(self, name: str) -> None:
        """A file or a folder with all in it; nothing happens where there is none."""
        with self._errors("remove", name):
            path = self._path(name, followed=False)
            if self.local:
                gone = _beside(path, GONE)
                _delete(gone)
                with contextlib.suppress(FileNotFoundError):  # away at once: a reader never sees half a folder
                    _delete(Path(path).rename(gone))
            elif self._fs.exists(path):
                self._fs.rm(path, recursive=True)

    def tidy(self) -> None:
        """Remove what a killed writer left half written or half removed. For the one process that may write here."""
        with self._errors("tidy", "what was left"):
            for path in list(self.local.rglob(".*")) if self.local else ():
                if path.name.endswith((ASIDE, GONE)):
                    _delete(path)

    def _path(self, name: str, followed: bool = True) -> str:
        """Where a file lies. What is written or removed is a link itself, which is not followed."""
        _require_within(name)
        path = f"{self._root}/{name}" if name else self._root
        end = path if followed else os.path.dirname(path)
        if self.local and not Path(end).resolve().is_relative_to(self.local.resolve()):
            raise StorageError(f"{path} is a link that leads out of {self}: put the files themselves there")
        return path

    def _object(self, name: str, content: bytes, shape: type[BaseModel], remedy: str) -> dict[str, Any]:
        try:
            shape.model_validate(value := from_json(content))
            if SEAL in value and sealed({key: item for key, item in value.items() if key != SEAL}) != content:
                raise ValueError("it is not as it was written, its sha256 differs")
        except ValueError as error:
            fault = str(error)
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                fault = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
            raise StorageError(f"{name} in {self} is damaged ({fault:.200}): {remedy}") from error
        return {key: item for key, item in value.items() if key != SEAL}

    @contextlib.contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        """Turn whatever the storage raises (each object store has exceptions of its own) into a StorageError."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                reason = "no space left on it; free some and give the same command again"
            raise StorageError(f"cannot {verb} {name} in {self}: {reason}") from error


def cache(folder: Path | None = None) -> Storage:
    """What all commands keep, by its content: by default $TRIBUTARY_CACHE, or tributary/ in the user's cache folder."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Storage(str(folder or os.environ.get("TRIBUTARY_CACHE") or caches / "tributary"))


def sealed(value: Mapping[str, Any]) -> bytes:
    """A JSON file with its own sha256 at the end, so that a changed one is known."""
    finite = from_json(to_json(value, inf_nan_mode="null"))
    seal = sha256(json.dumps(finite, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**finite, SEAL: seal}, indent=1) + "\n").encode()


def _locked(folder: Path) -> int:
    """A handle that locks a folder until it is closed. Raises a BlockingIOError where another one does. Network file
    systems may lock no folders."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        pass
    return handle


def _require_within(name: str) -> None:
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise StorageError(f"{name!r} is no name of a file in here: it leads out of the folder")


def _beside(path: Path | str, suffix: str) -> Path:
    return Path(path).with_name(f".{Path(path).name}{suffix}")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """A file's content, or a folder's names, on the disk for good."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
