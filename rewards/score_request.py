"""What a request for scores says (docs/remote_rewards.md), and what is refused. Imports nothing of this project, as
rewards/serving.py."""

import base64
import io
import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from fastapi import HTTPException
from PIL import Image, PngImagePlugin  # noqa: F401 (the plugin: now, and not in a thread)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOST = 4000  # characters of a message
UNPACKED = 4  # times a body at most: what its pictures take


@dataclass(frozen=True)
class Limits:
    """Beyond them a request is refused, for good (413) or for now (503)."""

    body: int = 64 * 2**20  # bytes of a request
    pictures: int = 1024  # of a request
    held: int = 4 * 2**30  # bytes of all requests that are here
    requests: int = 2048  # that are here: being read, waiting or scored
    read_seconds: float = 60.0  # for a request to arrive
    wait_seconds: float = 300.0  # for its answer
    end_seconds: int = 7  # after a signal, for what is here to be answered


class _Ask(BaseModel):
    """What a request says. Strict: a number is no text."""

    model_config = ConfigDict(strict=True, extra="forbid")
    prompts: Annotated[list[str], Field(min_length=1)]
    metadata: list[dict[str, Any]] | None = None
    images: list[str] | None = None
    pixels: str | None = None
    shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=4, max_length=4)] | None = None


class Asked(NamedTuple):
    pictures: list[np.ndarray]  # uint8 [H, W, 3]
    prompts: list[str]
    metadata: list[dict[str, Any]]


def line(text: str, most: int = MOST) -> str:
    """`text` in one line that a terminal takes for text."""
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(text[:most].split()))


def parse(body: bytes, limits: Limits) -> Asked:
    """Raises HTTPException 400 or 413. Nothing is unpacked before its size is known."""
    try:
        ask = _Ask.model_validate(json.loads(body, parse_constant=_no_constant))
    except ValidationError as error:
        first = error.errors()[0]
        raise HTTPException(400, line(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}")) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, line(f"the body is not JSON: {error}")) from error
    count = len(ask.prompts)
    if (ask.images is None) == (ask.pixels is None) or (ask.pixels is None) != (ask.shape is None):
        raise HTTPException(400, "expected either images, or pixels and shape")
    there = len(ask.images) if ask.images is not None else (ask.shape or [0])[0]
    if there != count or len(ask.metadata or ask.prompts) != count:
        of_metadata = "none" if ask.metadata is None else len(ask.metadata)
        raise HTTPException(400, f"{there} pictures, {count} prompts and {of_metadata} of metadata, expected as many")
    if count > limits.pictures:
        raise HTTPException(413, f"{count} pictures, at most {limits.pictures} in a request")
    pictures = _unpack(ask.images, limits) if ask.images is not None else _raw(ask, limits)
    return Asked(pictures, ask.prompts, ask.metadata or [{} for _ in ask.prompts])


def _raw(ask: _Ask, limits: Limits) -> list[np.ndarray]:
    shape, pixels = ask.shape or [], _decoded(ask.pixels or "", "pixels")
    if shape[3] != 3:
        raise HTTPException(400, f"shape: {shape}, expected [B, H, W, 3]")
    _require_size(math.prod(shape), limits)
    if len(pixels) != math.prod(shape):
        raise HTTPException(400, f"pixels: {len(pixels)} bytes for shape {shape}, expected {math.prod(shape)}")
    return list(np.frombuffer(pixels, np.uint8).reshape(shape))


def _unpack(images: list[str], limits: Limits) -> list[np.ndarray]:
    pictures, size = [], 0
    for i, text in enumerate(images):
        content = _decoded(text, f"images.{i}")
        try:
            with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
                size += 3 * image.width * image.height
                _require_size(size, limits)
                if image.mode != "RGB":
                    raise HTTPException(400, f"images.{i}: its mode is {image.mode}, expected RGB")
                pictures.append(np.asarray(image))
        except HTTPException:
            raise
        except Image.DecompressionBombError as error:
            raise HTTPException(413, f"images.{i}: {error}") from error
        except Exception as error:  # of the decoder, whatever the bytes make it raise
            raise HTTPException(400, line(f"images.{i}: no PNG that can be read: {error}")) from error
    return pictures


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise HTTPException(400, f"{where}: not base64: {error}") from error


def _require_size(size: int, limits: Limits) -> None:
    if size > UNPACKED * limits.body:
        most = UNPACKED * limits.body
        raise HTTPException(413, f"pictures of over {most} bytes when unpacked: ask for fewer, or smaller ones")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")
