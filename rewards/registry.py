"""Rewards by name, or a user's own as module:callable: `load` makes one, `check` finds its faults before.

Imports no torch by itself: names are checked before anything heavy is loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from diffusion.failures import RunFailure
from rewards.names import Backend
from rewards.weights import check as check_assets

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


SIZES = {"jpeg_compressibility": -1, "jpeg_incompressibility": 1}
# Those with neither weights nor a device.
PLAIN = {
    **dict.fromkeys(SIZES, "jpeg:JpegSize"),
    "shapes_accuracy": "shapes_accuracy:ShapesAccuracy",
    "shapes_alignment": "shapes_alignment:ShapesAlignment",
    "shapes_alignment_soft": "shapes_alignment_soft:ShapesAlignmentSoft",
}
MODELS = {"aesthetic": "aesthetic:Aesthetic", "hpsv2": "hpsv2:HPSv2", "imagereward": "imagereward:ImageReward"}
SUM = "weighted_sum"
OWN_SETTINGS = ("name", "weights", "device", "backend")
NAMES = tuple(sorted((*PLAIN, *MODELS, SUM)))


def load(
    name: str, weights: str | None = None, device: str = "cpu", backend: Backend = "native", **options: Any
) -> Reward:
    """The reward called `name`, or a user's own as `module:callable`.

    `weights` is a path or hub id for rewards that have weights; `options` go to the reward's constructor. `backend`
    package: imagereward and hpsv2 as their authors' packages compute them (rewards/package.py), without gradients.
    A user's callable takes (images, prompts) and returns [B]; with options it is first called with them.

    Raises:
        UnknownReward: see there.
        ValueError: weights or options that this reward does not take; for a reward model also `WeightsNotFound` and
            `BadWeights` of rewards/weights.py.
    """
    if weights is not None and name not in MODELS and backend == "native":
        raise ValueError(f"reward.weights: {name} takes none, got {weights!r} (your own reward: use reward.options)")
    if ":" in name and backend == "native":
        return UserReward.named(name, **options)
    reward_class = _class(name, backend)
    if backend == "package":
        options = {"name": name, "weights": weights, "device": device, **options}
    elif name in SIZES:
        options = {"sign": SIZES[name], **options}
    elif name in MODELS:
        options = {"weights": weights, "device": device, **options}
    elif name == SUM:
        options = {"device": device, **options}
    try:
        return reward_class(**options)
    except TypeError as error:
        raise ValueError(f"reward.options: {name}: {error}") from error


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
    own = ":" in name and weights is None and backend == "native"
    reward: Any
    if backend == "package":
        reward = load(name, weights, backend=backend, **options)
        check_assets(list(reward.assets.values()))
    elif own:
        reward = _import(name)
    elif name in MODELS:
        reward = _class(name)
        try:
            check_assets(reward.assets(weights, **options))
        except TypeError as error:
            raise ValueError(f"reward.options: {name}: {error}") from error
    elif name == SUM and weights is None:
        _class(name).check_terms(options, prompts, objective)
        return
    else:
        reward = load(name, weights, **options)
    # What a class or a factory makes may say so itself: the scorer asks again.
    if not (own and (isinstance(reward, type) or options) and not hasattr(reward, "differentiable")):
        check_gradient(reward, name, objective)
    check_prompts = getattr(reward, "check_prompts", None)
    if check_prompts is not None:
        check_prompts(prompts)


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


def describe(error: BaseException, reward: Any) -> str:
    """Type and text of what a reward raised; of a user's own, or one in a sum, also the lines of its file that the
    exception went through."""
    files = {file for term in getattr(reward, "rewards", [reward]) for file in getattr(term, "files", ())}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    lines = "; ".join(f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames)
    return f"{type(error).__name__}: {error}" + (f" (at {lines})" if lines else "")


@contextlib.contextmanager
def named_failure(kind: type[Exception], text: str, reward: Any) -> Iterator[None]:
    """What a reward's code raises, and it may raise anything, becomes `kind`: `text`, then as `describe` says it. But
    for a lack of GPU memory, which is not the reward's fault."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise kind(f"{text}: {describe(error, reward)}") from error


def _class(name: str, backend: Backend = "native") -> Any:
    """Imported only when asked for: the reward models need transformers."""
    if backend == "package":
        place = "package:PackageReward"
    elif name == SUM:
        place = "weighted_sum:WeightedSum"
    else:
        check_name(name)
        place = (PLAIN | MODELS)[name]
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
        # The files of a function, of a class, or of an object's class.
        parts = (function, *vars(function if isinstance(function, type) else type(function)).values())
        codes = [getattr(inspect.unwrap(part), "__code__", None) for part in parts]
        self.files = {code.co_filename for code in codes if code is not None}

    @classmethod
    def named(cls, name: str, **options: Any) -> UserReward:
        """The callable `module:callable`; a class, or a function where there are options, is called with them first.

        Raises:
            UnknownReward: it cannot be imported or made.
        """
        function = made = _import(name)
        try:
            if options or isinstance(function, type):
                made = function(**options)
        except Exception as error:  # a user's code may raise anything
            raise UnknownReward(
                f"reward.name: {name} cannot be made: {describe(error, cls(name, function))}"
            ) from error
        reward = cls(name, made)
        reward.differentiable = bool(getattr(made, "differentiable", getattr(function, "differentiable", False)))
        return reward

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        import torch

        scores = torch.as_tensor(self._function(images, prompts)).float()
        if scores.shape != (len(images),):
            raise ValueError(f"reward {self.name} returned shape {list(scores.shape)} for {len(images)} images")
        return scores
