"""Where a base model's parts are: a diffusers pipeline folder or a hub id, and which kind of pipeline it is.
Imports neither torch nor diffusers: a model's path is checked before anything slow starts."""

import contextlib
import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion.failures import RunFailure

ROOT = Path(__file__).resolve().parents[1]
INDEX = "model_index.json"
HUB_SECONDS = 10  # for the hub to answer
TINY_DECODER = ("config.json", "model.tiny_decoder")  # the index of one, and its setting
UNCONDITIONAL = ("DDPMPipeline", "DDIMPipeline")  # pixels from noise: a U-Net and a scheduler, nothing else


class BaseModelError(RunFailure, ValueError):
    """A model path that cannot be loaded; the message names it and the remedy."""


def locate(path: str, index: str = INDEX, key: str = "model.path") -> str:
    """The folder with an `index` file, or the hub id that `path` names. Raises BaseModelError, which names `key`."""
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / index).is_file():
            raise BaseModelError(f"{key}: {path} holds no diffusers model of the kind wanted (no {index})")
        return str(local)
    beside = [file.parent.name for place in (Path(), ROOT) for file in (place / local.parent).glob(f"*/{index}")]
    if (close := difflib.get_close_matches(local.name, beside, 1)) and local.parent != Path():  # the hub is not asked
        raise BaseModelError(f"{key}: no such folder: {path}; did you mean {local.parent / close[0]}?")
    if local.is_absolute() or path.startswith((".", "~")) or path.count(os.sep) != 1:
        raise BaseModelError(f"{key}: no such folder: {path}")
    return path  # a hub id


def is_unconditional(path: str) -> bool:
    """Whether the pipeline draws pixels without text. Raises BaseModelError as `locate`, or where no hub answers."""
    folder = locate(path)
    with load_errors(path):
        return _read(folder, INDEX)["_class_name"] in UNCONDITIONAL


def part_config(path: str, name: str) -> dict[str, Any]:
    """Of a pipeline's unet, vae, text_encoder or scheduler. Early DDPM pipelines, such as google/ddpm-cifar10-32, keep
    all files at the top. Raises as `is_unconditional`."""
    folder, file = locate(path), "scheduler_config.json" if name == "scheduler" else "config.json"
    with load_errors(path):
        try:
            return dict(_read(folder, f"{name}/{file}"))
        except OSError:
            if not is_unconditional(path):
                raise
            return dict(_read(folder, file))


@contextlib.contextmanager
def load_errors(path: str, key: str = "model.path") -> Iterator[None]:
    """What loading raises becomes a BaseModelError: one line with setting and path, and how to get a hub id."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, TypeError, NotImplementedError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        remedy = f"; where there is a network: `hf download {path} --local-dir FOLDER`, then set {key}=FOLDER"
        reason += "" if Path(path).expanduser().exists() else remedy
        raise BaseModelError(f"{key}: {path} is neither a model's folder nor reachable on the hub: {reason}") from error


def _read(folder: str, file: str) -> Any:
    """A JSON file of a folder or a hub repository."""
    place = os.path.join(folder, file)
    if not Path(folder).is_dir():
        from huggingface_hub import hf_hub_download, model_info, try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(folder, file), str):
            try:
                model_info(folder, timeout=HUB_SECONDS)  # once: a download tries for half a minute
            except Exception as error:  # of the hub's client, or its http library
                raise OSError(f"{error or type(error).__name__} (asked once, for {HUB_SECONDS} s at most)") from error
        place = hf_hub_download(folder, file)
    try:
        return json.loads(Path(place).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
