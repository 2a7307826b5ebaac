"""Building reward models from published weights: never initialised, always strict, always float32 and frozen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from rewards.weights import BadWeights

Module = TypeVar("Module", bound=nn.Module)
Shapes = Mapping[str, tuple[int, ...]]
NAMED = 5  # keys of each kind that a message names


def on_meta(make: Callable[[], Module]) -> Module:
    """The module with shapes only; `fill` gives it its tensors."""
    with torch.device("meta"):
        return make()


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def check_keys(found: Shapes, wanted: Shapes, what: str, optional: Collection[str] = ()) -> None:
    """
    Raises:
        BadWeights: `found` lacks keys of `wanted`, has others, or other shapes; `optional` keys alone may be absent.
    """
    missing = [key for key in wanted if key not in found and key not in optional]
    extra = [key for key in found if key not in wanted]
    misshapen = [
        f"{key} {list(shape)} (expected {list(wanted[key])})"
        for key, shape in found.items()
        if key in wanted and shape != tuple(wanted[key])
    ]
    said = [
        f"{len(keys)} {kind}: {', '.join(keys[:NAMED])}{', ...' if len(keys) > NAMED else ''}"
        for kind, keys in (("missing", missing), ("extra", extra), ("of another shape", misshapen))
        if keys
    ]
    if said:
        raise BadWeights(f"{what}, of {len(wanted)} keys {'; '.join(said)}")


def fill(module: Module, state: Mapping[str, Tensor], what: str | Path, device: str = "cpu") -> Module:
    """Give a module made `on_meta` its tensors as float32, frozen and in evaluation mode.

    Buffers that no checkpoint holds are made anew: of these models that is `position_ids`, [1, length] from 0.

    Raises:
        BadWeights: as `check_keys`.
    """
    check_keys(shapes_of(state), shapes_of(module.state_dict()), str(what))
    module.load_state_dict({key: tensor.float() for key, tensor in state.items()}, strict=True, assign=True)
    for part in module.modules():
        ids = getattr(part, "position_ids", None)
        if isinstance(ids, Tensor):
            part.position_ids = torch.arange(ids.shape[-1])[None]
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left:
        raise BadWeights(f"{what}: no weights for {', '.join(left)}")
    return module.eval().requires_grad_(False).to(device)


def score_head(width: int) -> nn.Sequential:
    """The linear stack width-1024-128-64-16-1 of aesthetic predictor and ImageReward: keys 0, 2, 4, 6 and 7, for its
    authors trained it with dropout in between. float32 always.
    """
    return nn.Sequential(
        nn.Linear(width, 1024), nn.Identity(), nn.Linear(1024, 128), nn.Identity(), nn.Linear(128, 64), nn.Identity(),
        nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip


HEAD_SHAPES = {"2": (128, 1024), "4": (64, 128), "6": (16, 64), "7": (1, 16)}


def head_layout(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    """Published keys and shapes of `score_head`."""
    weights = {"0": (1024, width), **HEAD_SHAPES}
    return {
        f"{prefix}{layer}.{kind}": shape if kind == "weight" else shape[:1]
        for layer, shape in weights.items()
        for kind in ("weight", "bias")
    }


def pair(prefix: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a layer's weight and bias; the bias is as long as the first dimension."""
    return {f"{prefix}.weight": shape, f"{prefix}.bias": shape[:1]}


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast of the caller's reaches a reward model: scores and gradients are float32."""
    with torch.autocast(device.type, enabled=False):
        yield


def match(images: Tensor, prompts: Sequence[str]) -> None:
    """
    Raises:
        ValueError: not [B, 3, H, W] with B prompts.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(prompts):
        raise ValueError(f"expected images [B, 3, H, W] and B prompts, got {list(images.shape)} and {len(prompts)}")
