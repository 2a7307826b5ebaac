"""What rewards are computed by, by content: code, weights and files. Scores that are kept are kept under this, so that
an edit of any of it is no longer answered with old scores.

Not seen: what a reward's code imports inside of functions, or reads without a setting that names it.
"""

import contextlib
import functools
import hashlib
import os
import pkgutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.registry import MODELS

HOME = Path(__file__).resolve().parent.parent
OURS = ("diffusion", "models", "rewards")  # what draws and scores
PACKAGES = ("diffusers", "numpy", "pillow", "torch", "transformers")
EXTRAS = ("onnxruntime", "rapidocr-onnxruntime")  # of the reward ocr; they may be missing
INSTALLED = tuple(sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
PARTS = (".bin", ".json", ".model", ".pt", ".pth", ".safetensors", ".txt")  # of a model's folder


def digest(settings: Any) -> str:
    """sha256 of everything that a tree of settings names: files and folders, models and their assets, a user's own
    code (module:callable, imported) with all of his that it imports."""
    found = hashlib.sha256()
    for label, path in sorted(set(_named(settings))):
        found.update(f"{label}\0{_content(path)}\0".encode())
    return found.hexdigest()


@functools.cache
def program() -> str:
    """sha256 of our own code that draws and scores, and the versions of what it calls."""
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    for name in EXTRAS:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{name} {version(name)}")
    files = sorted(file for room in OURS for file in (HOME / room).rglob("*.py"))
    contents = [f"{file.relative_to(HOME)} {_content(file)}" for file in files]
    return hashlib.sha256("\n".join(versions + contents).encode()).hexdigest()


def _named(value: Any) -> Iterator[tuple[str, Path]]:
    """Files, each by a name that is the same wherever they lie."""
    if isinstance(value, dict):
        if value.get("name") in MODELS:  # of a reward model, what its settings leave to its defaults
            options = {key: option for key, option in (value.get("options") or {}).items() if key != "seconds"}
            model = pkgutil.resolve_name(f"rewards.{MODELS[value['name']]}")
            yield from _named([asset.source for asset in model.assets(value.get("weights"), **options)])
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _named({"name": part} if isinstance(part, str) and part in MODELS else part)
    elif isinstance(value, str) and value:
        place, _, inside = value.partition(":")
        yield from _files(Path(value).expanduser())
        yield from _hub(place)
        yield from _modules(place) if inside else ()


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield path.name, path
    elif path.is_dir():  # two levels, as a pipeline has: a setting may name any folder
        for file in (*path.glob("*"), *path.glob("*/*")):
            if file.suffix in PARTS and file.is_file():
                yield str(file.relative_to(path)), file


def _hub(name: str) -> Iterator[tuple[str, Path]]:
    """Where the hub's cache keeps which commit it has."""
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub.constants import HF_HUB_CACHE

        yield from _files(Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs" / "main")


def _modules(name: str) -> Iterator[tuple[str, Path]]:
    """The user's own modules that the module `name` has to do with, itself among them."""
    found, look = set[str](), [sys.modules.get(name)]
    while look:
        module = look.pop()
        file = getattr(module, "__file__", None)
        if module is None or not file or module.__name__ in found or file.startswith(INSTALLED):
            continue
        if module.__name__.partition(".")[0] in OURS and Path(file).resolve().is_relative_to(HOME):
            continue  # in `program`
        found.add(module.__name__)
        yield module.__name__, Path(file)
        for value in vars(module).values():
            owner = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            look.append(sys.modules.get(owner) if isinstance(owner, str) else None)


def _content(path: Path) -> str:
    about = path.stat()
    return _sha256(path, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@functools.cache
def _sha256(path: Path, *changed: int) -> str:
    """Read once, until `changed` says that it is another file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
