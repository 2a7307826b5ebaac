"""Where reward models are read from: a local path, else the hub's cache, else the hub."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.failures import RunFailure

HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+(?::[^:]+)?")
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".json", ".txt")
HUB_SECONDS = 10  # for the hub to answer
HPS_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}  # of xswu/HPSv2


class WeightsNotFound(RunFailure, ValueError):
    """What a reward is read from is neither here nor to be had; the message names the setting."""


class NotFromHub(WeightsNotFound):
    """No path is wrong: no hub answers."""


class _Silence(FileNotFoundError):
    """The hub's."""


class BadWeights(RunFailure, ValueError):
    """A file that is there, but does not hold what the reward needs; the message names file and keys."""


@dataclass(frozen=True)
class Asset:
    """Something a reward is read from: a file, or, as `folder`, the folder that holds `files`."""

    key: str  # the setting that says where
    source: str  # a path, or a hub id `owner/repository`, also with `:file`
    files: tuple[str, ...]  # its names in a folder or repository
    folder: bool = False


def find(assets: Sequence[Asset], fetch: bool = True) -> list[Any]:
    """The local path of each, downloaded where need be. Without `fetch` the hub is only asked whether it would give
    what is not here, and that has None for a path. Raises WeightsNotFound, which names all that is missing at once,
    wrong paths before any hub is asked."""
    paths: list[Path | None] = []
    for look in (_local, lambda asset: _local(asset) or _from_hub(asset, fetch)):
        paths, missing, answered = [], [], False
        for asset in assets:
            try:
                paths.append(look(asset))
            except FileNotFoundError as error:
                missing.append(f"{asset.key}: {error}")
                answered |= not isinstance(error, _Silence)
        if missing:
            raise (WeightsNotFound if answered else NotFromHub)("; ".join(missing))
    return paths


def _local(asset: Asset) -> Path | None:
    """None: the source is no path here, but reads like a hub id."""
    path = Path(asset.source).expanduser()
    if path.is_dir():
        if missing := [name for name in asset.files if not (path / name).is_file()]:
            raise FileNotFoundError(f"{path} holds no {missing[0]}")
        return path if asset.folder else path / asset.files[0]
    if asset.folder and (path.is_file() or ":" in asset.source):
        raise FileNotFoundError(f"{asset.source} is a file, expected the folder or repository of {asset.files[0]}")
    if path.is_file():
        return path
    written_as_path = asset.source.startswith((".", "~", "/")) or asset.source.endswith(SUFFIXES)
    if not HUB_ID.fullmatch(asset.source) or (written_as_path and ":" not in asset.source):
        raise FileNotFoundError(f"no such file or folder: {asset.source}")
    return None


def _from_hub(asset: Asset, fetch: bool) -> Path | None:
    from huggingface_hub import model_info, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    repository, _, file = asset.source.partition(":")
    names = [file] if file else list(asset.files)
    try:
        if not all(isinstance(try_to_load_from_cache(repository, name), str) for name in names):
            offered = [entry.rfilename for entry in model_info(repository, timeout=HUB_SECONDS).siblings or ()]
            if missing := [name for name in names if name not in offered]:
                raise FileNotFoundError(f"no {missing[0]}")
            # Of one revision; a dry run fails where the hub would not give them.
            snapshot_download(repository, allow_patterns=names, dry_run=not fetch)
            if not fetch:
                return None
        path = Path(str(try_to_load_from_cache(repository, names[0])))
        return path.parent if asset.folder else path
    except Exception as error:  # of the hub's client, or its http library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        target = "/path/to/folder" if asset.folder else f"/path/to/{Path(names[0]).name}"
        kind = FileNotFoundError if isinstance(error, FileNotFoundError | HfHubHTTPError) else _Silence
        raise kind(
            f"{', '.join(names)} of https://huggingface.co/{repository} is not in the hub's cache, and the hub did not "
            f"give it ({reason}); where there is a network: `hf download {repository} {' '.join(names)} --local-dir "
            f"FOLDER`, then set {asset.key}={target}"
        ) from error


def read(path: Path, inside: str | None = None) -> dict[str, Any]:
    """The tensors of a safetensors file or torch checkpoint, under the key `inside` where there is one. Raises
    BadWeights where it is unreadable, code instead of tensors, or not tensors by name."""
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
