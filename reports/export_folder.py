"""A folder that appears in one piece, and knows again what it once wrote.

tributary.json in it, its manifest, has the sha256 of every other file: a folder whose files are all there unchanged is
an earlier export and may be replaced; anything else is somebody's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from records.storage import Storage

MANIFEST = "tributary.json"


class FolderTaken(ValueError):
    """A folder with files that no export wrote; the message names it, one of them, and the remedy."""


@contextlib.contextmanager
def new_folder(url: str, about: dict[str, Any]) -> Iterator[Path]:
    """An empty local folder to fill. At the block's end it becomes the one that `url` names, with a manifest of
    `about`; where the block raises, nothing is left of it. On an object store the manifest is written last.

    Raises:
        FolderTaken: before the block: there are files already, and not those of an earlier export.
        StorageError: it cannot be read or written.
    """
    storage = Storage(url)
    if storage.local:
        target = storage.local.resolve()
        _require_ours(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside, gone = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("new", "old"))
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir()
            yield aside
            _seal(aside, about)
            _require_ours(target)  # still: it took a while
            if target.exists():
                target.rename(gone)
            try:
                aside.rename(target)
            except OSError:
                if gone.exists():
                    gone.rename(target)
                raise
        finally:
            for folder in (aside, gone):
                shutil.rmtree(folder, ignore_errors=True)
        return
    if storage.entries() and not storage.exists(MANIFEST):
        raise FolderTaken(f"{storage} holds {storage.entries()[0]}, and not an earlier export; give another --out")
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)
        _seal(Path(made), about)
        for name in storage.entries():
            storage.remove(name)
        for name in sorted(_files(Path(made)), key=lambda name: name == MANIFEST):
            storage.write(name, (Path(made) / name).read_bytes())


def _require_ours(folder: Path) -> None:
    if folder.is_file():
        raise FolderTaken(f"{folder} is a file; give another --out")
    there = _files(folder)
    if not there:
        return
    try:
        sums = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        strange = [name for name in there if name != MANIFEST and sums.get(name) != _sum(folder / name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        strange = there
    if strange:
        raise FolderTaken(
            f"{folder} holds {strange[0]}, which is not as an export wrote it: give another --out, or empty the folder"
        )


def _seal(folder: Path, about: dict[str, Any]) -> None:
    """The manifest, and permissions as any new file has them: some libraries write weights for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for name in _files(folder):
        (folder / name).chmod(0o666 & ~mask)
    sums = {name: _sum(folder / name) for name in _files(folder)}
    (folder / MANIFEST).write_text(json.dumps({**about, "files": sums}, indent=1) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[str]:
    """Names of everything beneath that is no folder, sorted."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def _sum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
