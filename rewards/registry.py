"""Rewards by name, or a user's own as module:callable: `load` makes one, `check` finds its faults before.

Imports no torch by itself: names are checked before anything heavy is loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from diffusion.failures import RunFailure
from rewards.names import Backend
from rewards.weights import find

if TYPE_CHECKING:
    from torch import Tensor


class Reward(Protocol):
    """A reward model. `differentiable` says whether autograd reaches the images."""

    name: str
    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] float in [0, 1], B prompts -> raw scores [B] float32."""
        ...


class UnknownReward(RunFailure, ValueError):
    """No reward of that name, or a `module:callable` that cannot be imported or made; the message says why."""


class BadReward(RunFailure, ValueError):
    """A reward that failed, or is not finite: a data failure, never retried. Names reward, prompt and trajectory."""


# Those with neither weights nor a device.
PLAIN = {
    "jpeg_compressibility": "jpeg:JpegCompressibility",
    "jpeg_incompressibility": "jpeg:JpegIncompressibility",
    "shapes_accuracy": "shapes_accuracy:ShapesAccuracy",
    "shapes_alignment": "shapes_alignment:ShapesAlignment",
    "shapes_alignment_soft": "shapes_alignment_soft:ShapesAlignmentSoft",
}
MODELS = {"aesthetic": "aesthetic:Aesthetic", "hpsv2": "hpsv2:HPSv2", "imagereward": "imagereward:ImageReward"}
SUM = "weighted_sum"
NAMES = tuple(sorted((*PLAIN, *MODELS, SUM)))
OWN_SETTINGS = ("name", "weights", "device", "backend")


def load(
    name: str, weights: str | None = None, device: str = "cpu", backend: Backend = "native", **options: Any
) -> Reward:
    """The reward called `name`, or a user's own as `module:callable`.

    `weights` is a path or hub id for rewards that have weights; `options` go to the reward's constructor. `backend`
    package: imagereward and hpsv2 as their authors' packages compute them (rewards/package.py), without gradients.
    A user's callable takes (images, prompts) and returns [B]; a class, or with options a function, is called first.

    Raises:
        UnknownReward: see there.
        ValueError: weights or options that this reward does not take; for a reward model also `WeightsNotFound` and
            `BadWeights` of rewards/weights.py.
    """
    make, settings = _class(name, weights, backend), {"name": name, "weights": weights, "device": device}
    taken: tuple[str, ...] = () if name in PLAIN else ("device",) if name == SUM else ("weights", "device")
    if backend == "package" or make is UserReward:
        taken = ("name", "weights", "device") if backend == "package" else ("name",)
    with _named_options(name, options):
        return getattr(make, "named", make)(**{key: settings[key] for key in taken}, **options)


def check(
    name: str, weights: str | None, options: dict[str, Any], prompts: Sequence[str], objective: str | None = None,
    backend: Backend = "native",
) -> None:  # fmt: skip
    """Find out before anything starts whether `load` would fail, the reward refuse a prompt, or an `objective` that
    learns from its gradient find none. A user's own reward is only imported, not made: it may need the actor's device.
    Of a reward model nothing is read or downloaded: its files are looked for here, in the hub's cache and at the hub.

    Raises:
        ValueError: as `load`, or naming the prompt, or reward and objective.
    """
    check_options(options)
    reward: Any = _class(name, weights, backend)
    if reward is UserReward:
        reward = _import(name)
        if (isinstance(reward, type) or options) and not hasattr(reward, "differentiable"):
            return  # what it makes may say so itself: the scorer asks again
    elif backend == "package":
        reward = load(name, weights, backend=backend, **options)
        find(list(reward.assets.values()), fetch=False)
    elif name in MODELS:
        with _named_options(name, options):
            find(reward.assets(weights, **options), fetch=False)
    elif name == SUM:
        with _named_options(name, options):
            return reward.check(prompts, objective, **options)
    else:
        reward = load(name, **options)
    check_gradient(reward, name, objective)
    if hasattr(reward, "check_prompts") and not isinstance(reward, type):
        reward.check_prompts(prompts)


def check_name(name: str, backend: Backend = "native") -> None:
    """
    Raises:
        UnknownReward: no reward has this name. A user's own (module:callable) is not imported here.
    """
    if name not in NAMES and ":" not in name and backend == "native":
        known = ", ".join(NAMES)
        raise UnknownReward(f"reward.name: unknown reward {name!r}; known: {known}, or your own as module:callable")


def check_gradient(reward: Any, name: str, objective: str | None) -> None:
    """
    Raises:
        ValueError: `objective` learns from the gradient of the reward, and this one has none.
    """
    if objective and not getattr(reward, "differentiable", False):
        raise ValueError(
            f"objective.kind: {objective} learns from the gradient of the reward, and {name} is not differentiable; "
            "use dag_db, dag_kl or ddpo, or a reward that is: shapes_alignment_soft, aesthetic, imagereward, hpsv2, or "
            "your own with an attribute `differentiable = True` whose scores autograd can follow back to the images"
        )


def check_options(options: dict[Any, Any]) -> None:
    """
    Raises:
        ValueError: a key that cannot be a reward's own.
    """
    for key in options:
        if not isinstance(key, str) or not key.isidentifier() or key in OWN_SETTINGS:
            raise ValueError(
                f"reward.options: {key!r} cannot be an option of a reward; those of every reward, "
                f"{', '.join(OWN_SETTINGS)}, are settings beside reward.options"
            )


def check_device(device: str) -> None:
    """
    Raises:
        ValueError: torch does not know it, or has none here.
    """
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {device}: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def named_failure(kind: type[Exception], text: str, reward: Any) -> Iterator[None]:
    """What a reward's code raises, and it may raise anything, becomes `kind`: `text`, type and message; of a user's
    own, or one in a sum, also the lines of its file. But for a lack of GPU memory, which is not the reward's fault."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        rewards = getattr(reward, "rewards", {"": reward}).values()
        modules = {term.module for term in rewards if isinstance(term, UserReward)}
        trace = error.__traceback__
        lines = "; ".join(
            f"{at.filename}:{at.lineno} in {at.name}: {at.line}"
            for (frame, _), at in zip(traceback.walk_tb(trace), traceback.extract_tb(trace), strict=True)
            if frame.f_globals.get("__name__") in modules
        )
        raise kind(f"{text}: {type(error).__name__}: {error}" + (f" (at {lines})" if lines else "")) from error


@contextlib.contextmanager
def _named_options(name: str, options: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        raise ValueError(f"reward.options: {name}: {error}; got {', '.join(options) or 'none'}") from error


def _class(name: str, weights: str | None, backend: Backend) -> Any:
    """Imported only when asked for: the reward models need transformers.

    Raises:
        UnknownReward: see there.
        ValueError: `weights` of a reward that has none.
    """
    check_name(name, backend)
    if backend == "package":
        place = "package:PackageReward"
    elif weights is not None and name not in MODELS:
        raise ValueError(f"reward.weights: {name} takes none, got {weights!r} (your own reward: use reward.options)")
    else:
        place = (PLAIN | MODELS | {SUM: "weighted_sum:WeightedSum"}).get(name, "registry:UserReward")
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(f"rewards.{module}"), attribute)


def _import(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnknownReward(
            f"reward.name: cannot import {name!r}: {error} (looked in the current directory and PYTHONPATH)"
        ) from error
    if not callable(function):
        raise UnknownReward(f"reward.name: {name} is {type(function).__name__}, expected a function or a class")
    return function


class UserReward:
    """A user's own function, named in the config as `module:callable` or given as a Python object."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self._function = name, function
        self.differentiable = bool(getattr(function, "differentiable", False))
        self.module = getattr(function, "__module__", "")

    @classmethod
    def named(cls, name: str, **options: Any) -> UserReward:
        """The callable `module:callable`; a class, or a function where there are options, is called with them first.

        Raises:
            UnknownReward: it cannot be imported or made.
        """
        function = _import(name)
        reward = cls(name, function)
        if options or isinstance(function, type):
            with named_failure(UnknownReward, f"reward.name: {name} cannot be made", reward):
                reward._function = function(**options)
            reward.differentiable = bool(getattr(reward._function, "differentiable", reward.differentiable))
        return reward

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        import torch

        scores = torch.as_tensor(self._function(images, prompts)).float()
        if scores.shape != (len(images),):
            raise ValueError(f"reward {self.name} returned shape {list(scores.shape)} for {len(images)} images")
        return scores
