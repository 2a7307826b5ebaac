"""Where a base model's parts are: a diffusers pipeline folder or a hub id, and which kind of pipeline it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from diffusers import DiffusionPipeline

UNCONDITIONAL = ("DDPMPipeline", "DDIMPipeline")  # pixels from noise: a U-Net and a scheduler, nothing else


class BaseModelError(ValueError):
    """A model path that cannot be loaded; the message names it and the remedy."""


def locate(path: str) -> str:
    """The pipeline folder, or the hub id, that `path` names.

    Raises:
        BaseModelError: a path that does not exist, or a folder without a pipeline.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "model_index.json").is_file():
            raise BaseModelError(f"model.path: {path} holds no diffusers pipeline (no model_index.json)")
        return str(local)
    if local.is_absolute() or path.startswith((".", "~")) or path.count(os.sep) != 1:
        raise BaseModelError(f"model.path: no such folder: {path}")
    return path  # a hub id


def is_unconditional(path: str) -> bool:
    """Whether the pipeline draws pixels without text, VAE or guidance.

    Raises:
        BaseModelError: as `locate`, or the hub cannot be reached.
    """
    folder = locate(path)
    with load_errors(path):
        return DiffusionPipeline.load_config(folder)["_class_name"] in UNCONDITIONAL


def part(path: str, name: str) -> tuple[str, str | None]:
    """Folder and subfolder of an unconditional pipeline's part: early ones, such as google/ddpm-cifar10-32, keep all
    files at the top. A hub id is downloaded.

    Raises:
        BaseModelError: as `is_unconditional`.
    """
    folder = locate(path)
    if not Path(folder).is_dir():
        with load_errors(path):
            folder = DiffusionPipeline.download(folder)
    return folder, name if (Path(folder) / name).is_dir() else None


@contextlib.contextmanager
def load_errors(path: str) -> Iterator[None]:
    """What loading raises, as one line that names the path."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, NotImplementedError) as error:
        raise BaseModelError(
            f"model.path: {path} is neither a Stable-Diffusion or DDPM pipeline folder nor reachable on the hub: "
            f"{(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
