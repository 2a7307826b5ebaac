"""Where reward models are read from: a local path, else the hub's cache, else the hub."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.failures import RunFailure

HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+(?::[^:]+)?")
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".json", ".txt")
LONGEST_WAIT = 10  # seconds for the hub to say whether it has a file


class WeightsNotFound(RunFailure, ValueError):
    """Something a reward is read from is neither here nor to be had; the message says what, from where, which key."""


class BadWeights(RunFailure, ValueError):
    """A file that was found, but does not hold what the reward needs; the message names file and keys."""


@dataclass(frozen=True)
class Asset:
    """Something a reward is read from.

    `key` is the setting that says where; `source` a path, or a hub id `owner/repository`, also with `:file`. `files`
    are the names it has in a folder or repository, `a|b` where either will do, `a?` where it may be absent. `folder`:
    the reward is handed the folder, not the file.
    """

    key: str
    source: str
    files: tuple[str, ...]
    folder: bool = False


def check(assets: Sequence[Asset]) -> None:
    """Is everything there? The hub is asked, but nothing is downloaded.

    Raises:
        WeightsNotFound: names all that is missing at once.
    """
    _each(assets, fetch=False)


def check_paths(assets: Sequence[Asset]) -> None:
    """Is every local path there? No hub is asked.

    Raises:
        WeightsNotFound: names the first that is not.
    """
    for asset in assets:
        _local(asset)


def find(assets: Sequence[Asset]) -> list[Path]:
    """The local path of each, downloaded where need be: a folder, or a file.

    Raises:
        WeightsNotFound: names all that is missing at once.
    """
    return _each(assets, fetch=True)


def _each(assets: Sequence[Asset], fetch: bool) -> list[Path]:
    missing: list[str] = []
    # Paths first: a wrong one is said before any hub is asked.
    found: list[Path | None] = []
    for step in (_local, lambda asset: _local(asset) or _from_hub(asset, fetch)):
        found = []
        for asset in assets:
            try:
                found.append(step(asset))
            except WeightsNotFound as error:
                missing.append(str(error))
        if missing:
            raise WeightsNotFound("; ".join(missing))
    return [path for path in found if path is not None]


def _local(asset: Asset) -> Path | None:
    """None: the source is no path here, but reads like a hub id."""
    path = Path(asset.source).expanduser()
    if path.is_dir():
        for names in asset.files:
            there = [path / name for name in names.rstrip("?").split("|") if (path / name).is_file()]
            if not there and not names.endswith("?"):
                raise WeightsNotFound(f"{asset.key}: {path} holds no {names.replace('|', ' or ')}")
        return path if asset.folder else there[0]
    if path.is_file():
        if asset.folder:
            raise WeightsNotFound(f"{asset.key}: {path} is a file, expected the folder that holds {asset.files[0]}")
        return path
    written_as_path = asset.source.startswith((".", "~", "/")) or asset.source.endswith(SUFFIXES)
    if not HUB_ID.fullmatch(asset.source) or (written_as_path and ":" not in asset.source):
        raise WeightsNotFound(f"{asset.key}: no such file or folder: {asset.source}")
    return None


def _from_hub(asset: Asset, fetch: bool) -> Path | None:
    repository, _, file = asset.source.partition(":")
    if file and asset.folder:
        raise WeightsNotFound(f"{asset.key}: {asset.source} is one file, expected a repository or folder")
    paths: list[Path | None] = []
    for names in (file,) if file else asset.files:
        reasons = []
        for name in names.rstrip("?").split("|"):
            try:
                paths.append(_download(repository, name) if fetch else _ask(repository, name))
                break
            except Exception as error:  # of the hub's client, or its http library
                reasons.append((str(error).strip() or type(error).__name__).splitlines()[0])
        else:
            if not names.endswith("?"):
                raise WeightsNotFound(_how_to_get(asset, repository, file, reasons[-1]))
    folders = {path.parent for path in paths if path is not None}
    if asset.folder and len(folders) > 1:
        raise WeightsNotFound(
            f"{asset.key}: the hub's cache holds files of several revisions of {repository}; mend it with "
            f"`hf download {repository} {' '.join(_names(asset))}`"
        )
    return paths[0].parent if paths[0] and asset.folder else paths[0]


def _download(repository: str, name: str) -> Path:
    """From the cache, else the hub. Raises what the hub's client raises when it is at neither."""
    from huggingface_hub import hf_hub_download

    return _cached(repository, name) or Path(hf_hub_download(repository, name))


def _ask(repository: str, name: str) -> Path | None:
    """As `_download`, but without downloading: None when the hub has it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if (cached := _cached(repository, name)) is None:
        get_hf_file_metadata(hf_hub_url(repository, name), timeout=LONGEST_WAIT)
    return cached


def _cached(repository: str, name: str) -> Path | None:
    """
    Raises:
        ConnectionError: not cached, and the hub does not answer.
    """
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repository, name)
    if isinstance(cached, str):
        return Path(cached)
    if silent := _silent(int(time.monotonic() // 60)):
        raise ConnectionError(silent)
    return None


@functools.lru_cache(1)
def _silent(minute: int) -> str:
    """Why the hub does not answer; empty when it does. Asked once a minute: its client tries six times a file."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=LONGEST_WAIT)
    except Exception as error:  # of its http library
        return f"no answer from {constants.ENDPOINT}: {error}"
    return ""


def _names(asset: Asset) -> list[str]:
    return [names.rstrip("?").split("|")[0] for names in asset.files]


def _how_to_get(asset: Asset, repository: str, file: str, reason: str) -> str:
    names = [file] if file else _names(asset)
    target = "/path/to/folder" if asset.folder else f"/path/to/{Path(names[0]).name}"
    return (
        f"{asset.key}: {', '.join(names)} of https://huggingface.co/{repository} is not in the hub's cache, and "
        f"the hub did not give it ({reason}); where there is a network: `hf download {repository} {' '.join(names)} "
        f"--local-dir FOLDER`, then set {asset.key}={target}"
    )


def read(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file or torch checkpoint, under the key `inside` where there is one.

    Raises:
        BadWeights: unreadable, code instead of tensors, or not tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            held: Any = load_file(path)
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, safetensors and torch have one each
        raise BadWeights(f"{path} cannot be read as weights: {type(error).__name__}: {error}") from error
    if inside and isinstance(held, dict) and inside in held:
        held = held[inside]
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise BadWeights(f"{path} holds no tensors by name")
    return held
