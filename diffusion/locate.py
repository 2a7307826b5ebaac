"""Where a base model's parts are: a diffusers pipeline folder or a hub id, and which kind of pipeline it is.
Imports neither torch nor diffusers: a model's path is checked before anything slow starts."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusion.failures import RunFailure

INDEX = "model_index.json"
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
        from huggingface_hub import hf_hub_download

        place = hf_hub_download(folder, file)
    try:
        return json.loads(Path(place).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
