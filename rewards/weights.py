"""Where reward models are read from: a local path, else the hub's cache, else the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.failures import RunFailure

if TYPE_CHECKING:
    from torch import Tensor

HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+(?::[^:]+)?")
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".json", ".txt")
HUB_SECONDS = 10  # for the hub to answer
HPS_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}  # of xswu/HPSv2


class WeightsNotFound(RunFailure, ValueError):
    """Something a reward is read from is neither here nor to be had; the message says what, from where, which key."""


class BadWeights(RunFailure, ValueError):
    """A file that is there, but does not hold what the reward needs; the message names file and keys."""


@dataclass(frozen=True)
class Asset:
    """Something a reward is read from: a file, or, as `folder`, the folder that holds `files`."""

    key: str  # the setting that says where
    source: str  # a path, or a hub id `owner/repository`, also with `:file`
    files: tuple[str, ...]  # its names in a folder or repository: `a|b` where either will do, `a?` may be absent
    folder: bool = False


def find(assets: Sequence[Asset], fetch: bool = True) -> list[Any]:
    """The local path of each, downloaded where need be. Without `fetch` nothing is downloaded, and the hub is only
    asked whether it would give what is not here; that has None for a path.

    Raises:
        WeightsNotFound: names all that is missing at once, wrong paths before any hub is asked.
    """
    paths: list[Path | None] = []
    for look in (_local, lambda asset: _local(asset) or _from_hub(asset, fetch)):
        paths, missing = [], []
        for asset in assets:
            try:
                paths.append(look(asset))
            except WeightsNotFound as error:
                missing.append(str(error))
        if missing:
            raise WeightsNotFound("; ".join(missing))
    return paths


def _pick(files: Sequence[str], has: Callable[[str], bool]) -> list[str]:
    """Of `Asset.files` the names to read, where `has` says which a place has.

    Raises:
        FileNotFoundError: it has none of a file's names.
    """
    names = []
    for alternatives in files:
        name = next(filter(has, alternatives.rstrip("?").split("|")), None)
        if name is not None:
            names.append(name)
        elif not alternatives.endswith("?"):
            raise FileNotFoundError(f"no {alternatives.replace('|', ' or ')}")
    return names


def _local(asset: Asset) -> Path | None:
    """None: the source is no path here, but reads like a hub id."""
    path = Path(asset.source).expanduser()
    if path.is_dir():
        try:
            names = _pick(asset.files, lambda name: (path / name).is_file())
        except FileNotFoundError as error:
            raise WeightsNotFound(f"{asset.key}: {path} holds {error}") from error
        return path if asset.folder else path / names[0]
    if path.is_file():
        if asset.folder:
            raise WeightsNotFound(f"{asset.key}: {path} is a file, expected the folder that holds {asset.files[0]}")
        return path
    written_as_path = asset.source.startswith((".", "~", "/")) or asset.source.endswith(SUFFIXES)
    if not HUB_ID.fullmatch(asset.source) or (written_as_path and ":" not in asset.source):
        raise WeightsNotFound(f"{asset.key}: no such file or folder: {asset.source}")
    if asset.folder and ":" in asset.source:
        raise WeightsNotFound(f"{asset.key}: {asset.source} is one file, expected a repository or folder")
    return None


def _from_hub(asset: Asset, fetch: bool) -> Path | None:
    from huggingface_hub import model_info, snapshot_download, try_to_load_from_cache

    repository, _, file = asset.source.partition(":")
    files = (file,) if file else asset.files
    try:
        try:
            names = _pick(files, lambda name: isinstance(try_to_load_from_cache(repository, name), str))
        except FileNotFoundError:
            offered = {entry.rfilename for entry in model_info(repository, timeout=HUB_SECONDS).siblings or ()}
            names = _pick(files, offered.__contains__)
            # Of one revision; a dry run fails where the hub would not give them.
            snapshot_download(repository, allow_patterns=names, dry_run=not fetch)
            if not fetch:
                return None
        path = Path(str(try_to_load_from_cache(repository, names[0])))
        return path.parent if asset.folder else path
    except Exception as error:  # of the hub's client, or its http library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        names = [name.rstrip("?").split("|")[0] for name in files]
        target = "/path/to/folder" if asset.folder else f"/path/to/{Path(names[0]).name}"
        raise WeightsNotFound(
            f"{asset.key}: {', '.join(names)} of https://huggingface.co/{repository} is not in the hub's cache, and "
            f"the hub did not give it ({reason}); where there is a network: `hf download {repository} "
            f"{' '.join(names)} --local-dir FOLDER`, then set {asset.key}={target}"
        ) from error


def read(path: Path, inside: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file or torch checkpoint, under the key `inside` where there is one.

    Raises:
        BadWeights: unreadable, code instead of tensors, or not tensors by name.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, safetensors and torch have one each
        raise BadWeights(f"{path} cannot be read as weights: {type(error).__name__}: {error}") from error
    if inside and isinstance(state, dict) and inside in state:
        state = state[inside]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise BadWeights(f"{path} holds no tensors by name")
    return state
