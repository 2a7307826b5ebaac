"""Environments of the reward packages' own: where they are, whether one is whole, and how it is built."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOCKS = Path(__file__).resolve().parent / "locks"
NAMES = ("hpsv2", "imagereward")
BUILD_SECONDS = 3600  # of one step
MARKER = "tributary.json"
BUILDERS = ("setuptools", "wheel")  # what source distributions are built with
BPE = "bpe_simple_vocab_16e6.txt.gz"


class EnvironmentMissing(ValueError):
    """No environment for a package where it was looked for, or not one that fits; the message says how to get it."""


class BuildFailed(RuntimeError):
    """An environment could not be built; the message has the command and what it said last."""


def default_folder(name: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "tributary" / "packages" / name


def interpreter(folder: Path) -> Path:
    return folder / "bin" / "python"


def pins(name: str) -> dict[str, str]:
    """Package -> `package==version`, in the lock file's order."""
    lines = (line.strip() for line in lock(name).read_text(encoding="utf-8").splitlines())
    return {line.partition("==")[0]: line for line in lines if line and not line.startswith("#")}


def lock(name: str) -> Path:
    return LOCKS / f"{name}.txt"


def find(name: str, python: str | None = None) -> Path:
    """The interpreter for a package: a user's own choice, or that of the environment `build` makes.

    Raises:
        EnvironmentMissing: it is not there, or was built from another lock file.
    """
    command = f"python -m rewards.package build {name}"
    if python is not None:
        path = Path(python).expanduser()
        if not os.access(path, os.X_OK) or path.is_dir():
            raise EnvironmentMissing(
                f"reward.options.python: {path} is no interpreter; `{command}` makes an environment and prints its own"
            )
        return path.absolute()  # not resolve(): the link is what tells python its environment
    folder = default_folder(name)
    if not interpreter(folder).exists() or not (folder / MARKER).exists():
        raise EnvironmentMissing(
            f"reward.backend: there is no environment for {name} in {folder}; `{command}` builds it (some minutes, "
            "1.2 GB), on every machine that scores; or name an interpreter that has the package: reward.options.python"
        )
    if not _fits(name, folder):
        raise EnvironmentMissing(
            f"reward.backend: the environment in {folder} was built for another Tributary; `{command}` renews it"
        )
    return interpreter(folder)


def build(name: str, folder: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """The interpreter of a whole environment in `folder`, which is built where it is not there.

    It is made aside and renamed at the end, so that half of one is never found; builds at once wait for each other.

    Raises:
        BuildFailed: see there.
    """
    folder = (folder or default_folder(name)).expanduser().absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent / f".{folder.name}.lock"):
            _build(name, folder, say)
    except OSError as error:
        raise BuildFailed(f"cannot write {error.filename or folder}: {error.strerror}") from error
    return interpreter(folder)


def _build(name: str, folder: Path, say: Callable[[str], None]) -> None:
    if _fits(name, folder):
        say(f"{name}: {folder} is there already")
        return
    if folder.exists() and not (folder / MARKER).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BuildFailed(f"{folder} is something else; remove it, or choose another folder with --dir")
    aside = folder.parent / f".{folder.name}.building"  # what is left of a build that was killed goes
    shutil.rmtree(aside, ignore_errors=True)
    try:
        say(f"{name}: building in {folder} (some minutes)")
        _run([sys.executable, "-m", "venv", str(aside)])
        _install(name, interpreter(aside), say)
        if name == "hpsv2":
            _complete_hps(aside)
        (aside / MARKER).write_text(json.dumps({"package": name, "lock_sha256": _digest(name)}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # of another lock file, or empty
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _install(name: str, python: Path, say: Callable[[str], None]) -> None:
    pinned = pins(name)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch alone with its dependencies: they differ by machine (CUDA's libraries, or none).
    say(f"{name}: torch")
    _run([*pip, "--constraint", str(lock(name)), pinned["torch"]])
    builders = [pinned[builder] for builder in BUILDERS if builder in pinned]
    if builders:
        _run([*pip, "--no-deps", *builders])
    say(f"{name}: the rest")
    # The packages' own pins contradict each other, hence --no-deps; and a source distribution is built with the
    # pinned tools, not with the newest.
    _run([*pip, "--no-deps", "--no-build-isolation", "--requirement", str(lock(name))])


def _complete_hps(folder: Path) -> None:
    """hpsv2's wheel lacks the vocabulary of its tokenizer, which open_clip_torch's has."""
    [packages] = folder.glob("lib/python*/site-packages")
    source, target = packages / "open_clip" / BPE, packages / "hpsv2" / "src" / "open_clip" / BPE
    if not source.exists():
        raise BuildFailed(f"open_clip_torch no longer has {BPE}, which hpsv2's tokenizer needs")
    shutil.copyfile(source, target)


def _run(command: list[str]) -> None:
    # A pip or python setting of the caller's own environment has no business in this one.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL, timeout=BUILD_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"`{' '.join(command)}` took longer than {BUILD_SECONDS} s") from error
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-5:]
        raise BuildFailed(f"`{' '.join(command)}` failed:\n  " + "\n  ".join(said))


def _digest(name: str) -> str:
    return hashlib.sha256("\n".join(pins(name).values()).encode()).hexdigest()


def _fits(name: str, folder: Path) -> bool:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # An interpreter that was removed since leaves a link to nowhere.
    return marker == {"package": name, "lock_sha256": _digest(name)} and interpreter(folder).exists()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
