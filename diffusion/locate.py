"""Where a base model's parts are: a diffusers pipeline folder or a hub id, and which kind of pipeline it is.
Imports neither torch nor diffusers: a model's path is checked before anything slow starts."""

import contextlib
import difflib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion import families, single_files
from diffusion.failures import RunFailure
from diffusion.families import FAMILIES, Family
from diffusion.single_files import AGAIN

ROOT = Path(__file__).resolve().parents[1]
INDEX = "model_index.json"
PUBLISHED = ROOT / "configs" / "models"  # by hub id: configurations without weights, to count by
HUB_SECONDS = 10  # for the hub to answer
TINY_DECODER = ("config.json", "model.tiny_decoder")  # the index of one, and its setting


class BaseModelError(RunFailure, ValueError):
    """A model path that cannot be loaded; the message names it and the remedy."""


class NoHub(BaseModelError):
    """It may be a hub id, but no hub answers."""


def locate(path: str, index: str = INDEX, key: str = "model.path") -> str:
    """The folder with an `index` file, or the hub id that `path` names. Raises BaseModelError, which names `key`."""
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / index).is_file():
            raise BaseModelError(f"{key}: {path} holds no {index}: name a whole diffusers folder, or {AGAIN}")
        return str(local)
    if local.is_file():
        if index != INDEX:
            raise BaseModelError(f"{key}: {path} is a file, and a diffusers folder is wanted")
        said = f"is {single_files.described(local)}. Wanted is a diffusers folder of one of: {families.known()}"
        raise BaseModelError(f"{key}: {path} {said}")
    beside = [file.parent.name for place in (Path(), ROOT) for file in (place / local.parent).glob(f"*/{index}")]
    if (close := difflib.get_close_matches(local.name, beside, 1)) and local.parent != Path():  # the hub is not asked
        raise BaseModelError(f"{key}: no such folder: {path}; did you mean {local.parent / close[0]}?")
    if local.is_absolute() or path.startswith((".", "~")) or path.count(os.sep) != 1:
        raise BaseModelError(f"{key}: no such folder: {path}")
    return path  # a hub id


def countable(path: str) -> str:
    """`path`; where it is a hub id that cannot be read because no hub answers, the repository's own folder of its
    configurations, if it has one. Nothing can be loaded from that: it is to count by."""
    own = PUBLISHED / path
    if not Path(path).exists() and (own / INDEX).is_file():
        try:
            pipeline_index(path)
        except NoHub:
            return str(own)
        except BaseModelError:  # a hub's answer, which whoever reads the path next gets, too
            pass
    return path


def pipeline_index(path: str) -> dict[str, Any]:
    """Its model_index.json. Raises BaseModelError as `locate`, where no hub answers, and for a class not supported."""
    folder = locate(path)
    with load_errors(path):
        index = _read(folder, INDEX)
    found = index.get("_class_name")
    if not isinstance(found, str) or not any(found in family.pipelines for family in FAMILIES):
        said = f"is a {found}" if isinstance(found, str) else f"has no pipeline's _class_name in its {INDEX}"
        raise BaseModelError(f"model.path: {path} {said}; what can be trained: {families.known()}")
    return index


def family_of(path: str) -> Family:
    """The kind of pipeline. Raises BaseModelError as `pipeline_index`."""
    found = pipeline_index(path)["_class_name"]
    return next(family for family in FAMILIES if found in family.pipelines)


def is_unconditional(path: str) -> bool:
    """Whether the pipeline draws pixels without text. Raises BaseModelError as `pipeline_index`."""
    return not family_of(path).text


def part_config(path: str, name: str) -> dict[str, Any]:
    """Of a pipeline's network, VAE, text encoders or scheduler. Early DDPM pipelines, such as google/ddpm-cifar10-32,
    keep all files at the top. Raises as `is_unconditional`."""
    folder, file = locate(path), "scheduler_config.json" if name == "scheduler" else "config.json"
    with load_errors(path):
        try:
            return _read(folder, f"{name}/{file}")
        except OSError:
            if is_unconditional(path):
                with contextlib.suppress(OSError):
                    return _read(folder, file)
            raise


def part_shapes(path: str, name: str) -> dict[str, list[int]] | None:
    """Shapes of a part's tensors by name, from the header of its .safetensors file. None where there is none to read:
    a hub's file that is not here yet, shards, or (of a model without text) an old .bin. Raises BaseModelError where the
    file is absent or not whole."""
    from safetensors import SafetensorError, safe_open

    file = part_file(name)
    place = _place(locate(path), name, file)
    if place is None or place.with_name(f"{file}.index.json").is_file():
        return None
    if not place.is_file():
        old = place.with_suffix(".bin")
        if old.is_file() and is_unconditional(path):
            if not zipfile.is_zipfile(old):
                raise BaseModelError(f"model.path: {old} is damaged; {AGAIN}")
            return None
        there = sorted(each.name for each in place.parent.glob("*.*") if each.suffix in (".safetensors", ".bin"))
        remedy = "open it in diffusers (with variant='fp16', or use_safetensors=False) and save_pretrained(FOLDER)"
        raise BaseModelError(
            f"model.path: {place} is missing; " + (f"there is {', '.join(there)}: {remedy}" if there else AGAIN)
        )
    try:
        with safe_open(str(place), "np") as opened:
            names = list(opened.keys())
            return {key: opened.get_slice(key).get_shape() for key in names}
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"model.path: {place} is damaged ({' '.join(str(error).split())}); {AGAIN}") from error


def part_file(name: str) -> str:
    return "model.safetensors" if name.startswith("text_encoder") else "diffusion_pytorch_model.safetensors"


def _place(folder: str, name: str, file: str) -> Path | None:
    """Where a part's file is, or would be; None where it is on a hub."""
    if Path(folder).is_dir():
        part = Path(folder, name)
        return (part if part.is_dir() else Path(folder)) / file
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(folder, f"{name}/{file}")
    return Path(cached) if isinstance(cached, str) else None


@contextlib.contextmanager
def load_errors(path: str, key: str = "model.path", part: str = "") -> Iterator[None]:
    """What loading raises becomes a BaseModelError: one line with setting, path, `part` and remedy. Whatever it is: of
    a damaged configuration libraries make errors of every kind."""
    try:
        yield
    except BaseModelError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        reason = reason if isinstance(error, (OSError, ValueError)) and reason else f"{type(error).__name__}: {reason}"
        if Path(path).expanduser().exists():
            place = os.path.join(path, part) if part else path
            raise BaseModelError(f"{key}: {place} cannot be used: {reason}; {AGAIN}") from error
        remedy = f"where there is a network: `hf download {path} --local-dir FOLDER`, then set {key}=FOLDER"
        where = f"{path} is neither a model's folder nor reachable on the hub"
        kind = NoHub if isinstance(error, ConnectionError) else BaseModelError
        raise kind(f"{key}: {where}: {reason}; {remedy}") from error


def _read(folder: str, file: str) -> dict[str, Any]:
    """A JSON file of a folder or a hub repository."""
    place = os.path.join(folder, file)
    if not Path(folder).is_dir():
        from huggingface_hub import hf_hub_download, model_info, try_to_load_from_cache
        from huggingface_hub.errors import HfHubHTTPError

        if not isinstance(try_to_load_from_cache(folder, file), str):
            try:
                model_info(folder, timeout=HUB_SECONDS)  # once: a download tries for half a minute
            except Exception as error:  # of the hub's client, or its http library
                kind = OSError if isinstance(error, HfHubHTTPError) else ConnectionError  # that is an answer
                raise kind(f"{error or type(error).__name__} (asked once, for {HUB_SECONDS} s at most)") from error
        place = hf_hub_download(folder, file)
    try:
        content = json.loads(Path(place).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    return content
