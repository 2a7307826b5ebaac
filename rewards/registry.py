"""Rewards by name, or a user's own as module:callable: `load` makes one, `check` finds its faults before.
Imports no torch by itself."""

import contextlib
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from diffusion.failures import RunFailure
from rewards.contract import OPTIONAL, Columns, Reward, ask, parameters, told
from rewards.own_code import named_failure
from rewards.weights import Asset, find

if TYPE_CHECKING:
    from torch import Tensor


class UnknownReward(RunFailure, ValueError):
    """No reward of that name, or a `module:callable` that cannot be imported or made; the message says why."""


class NoReward(UnknownReward):
    """A user's own, as module:callable, that is none: it cannot be imported or made, or not be called as one."""


class CannotBeMade(NoReward):
    """Its own code raised as it was made: here, but perhaps not on another machine."""


class BadReward(RunFailure, ValueError):
    """A reward that failed, or is not finite: a data failure, never retried. Names reward, prompt and trajectory."""


# Those with neither weights nor a device.
PLAIN = {
    "jpeg_compressibility": "jpeg:JpegCompressibility",
    "jpeg_incompressibility": "jpeg:JpegIncompressibility",
    "ocr": "ocr:Ocr",
    "remote": "remote:Remote",
    "shapes_accuracy": "shapes_alignment:ShapesAccuracy",
    "shapes_alignment": "shapes_alignment:ShapesAlignment",
    "shapes_alignment_soft": "shapes_alignment:ShapesAlignmentSoft",
    "shapes_preference": "shapes_preference:ShapesPreference",
    "shapes_preference_soft": "shapes_preference:ShapesPreferenceSoft",
}
MODELS = {
    "aesthetic": "aesthetic:Aesthetic",
    "clip_score": "clip_score:ClipScore",
    "hpsv2": "hpsv2:HPSv2",
    "imagereward": "imagereward:ImageReward",
    "pickscore": "pickscore:PickScore",
}
SUM = "weighted_sum"
NAMES = tuple(sorted((*PLAIN, *MODELS, SUM)))


def load(name: str, weights: str | None = None, device: str = "cpu", **options: Any) -> Reward:
    """The reward called `name`, or a user's own as `module:callable`. `weights` is a path or hub id; `options` go to
    the reward's constructor.

    Raises UnknownReward, ValueError for weights or options that this reward does not take, WeightsNotFound, BadWeights.
    """
    make, settings = _maker(name, weights, device)
    with _named_options(name, options):
        return make(**settings, **options)


def check(
    name: str, weights: str | None, options: dict[str, Any], prompts: Sequence[str], objective: str | None = None
) -> None:
    """Raises ValueError where `load` would fail, the reward refuse a prompt, or an `objective` that learns from its
    gradient find none. A user's own reward is only imported, not made: it may need the actor's device. Of a reward
    model nothing is read or downloaded: its files are looked for."""
    check_options(options)
    reward, settings = _maker(name, weights, "cpu")
    with _named_options(name, options):
        if reward is user_reward:
            reward = _import(name)
            if (isinstance(reward, type) or options) and not hasattr(reward, "differentiable"):
                return  # what it makes may say so itself: the scorer asks again
        elif name == SUM:
            return reward.check(prompts, objective, **options)
        elif name in MODELS:
            find(assets(name, weights, options), fetch=False)
        else:
            reward = reward(**settings, **options)
    check_gradient(reward, name, objective)
    if hasattr(reward, "check_prompts") and not isinstance(reward, type):
        reward.check_prompts(prompts)


def assets(name: str, weights: str | None, options: dict[str, Any]) -> list[Asset]:
    """What the reward model `name` is read from. Raises ValueError for weights or options that it does not take."""
    model, _ = _maker(name, weights, "cpu")
    with _named_options(name, options):
        return model.assets(weights, **options)


def reads_weights(name: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether this reward, or one of a sum, is a model with weights: large, and perhaps not to be had here."""
    terms = (options or {}).get("terms")
    inside = [term.get("name") for term in terms if isinstance(term, dict)] if isinstance(terms, list | tuple) else []
    return any(each in MODELS for each in (name, *inside))


def check_name(name: str) -> None:
    """Raises UnknownReward where no reward has this name, or it is no module:callable. Nothing is imported here."""
    if name in NAMES:
        return
    if ":" in name:
        _place(name)
    elif (file := Path(f"{name.removesuffix('.py')}.py")).is_file() or name.endswith(".py"):
        raise UnknownReward(f"reward.name: {name!r}: which function in it? {file}:FUNCTION")
    else:
        close = difflib.get_close_matches(name, NAMES, 1)
        known = f"did you mean {close[0]}? Known: " if close else "known: "
        raise UnknownReward(
            f"reward.name: unknown reward {name!r}; {known}{', '.join(NAMES)}, or your own as module:callable"
        )


def _place(name: str) -> tuple[str, str]:
    """Module and attribute of `module:callable`; a module below the current directory may be written as a path."""
    module, _, attribute = name.rpartition(":")
    if module.endswith(".py"):
        path = PurePath(module.removesuffix(".py"))
        if path.is_absolute() or ".." in path.parts:
            way = f"PYTHONPATH={path.parent} before the command, and reward.name={path.name}:{attribute}"
            raise UnknownReward(f"reward.name: {name!r} is not below the current directory: set {way}")
        module = ".".join(path.parts)
    if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        raise UnknownReward(f"reward.name: {name!r}, expected module:callable or file.py:callable")
    return module, attribute


def check_gradient(reward: Any, name: str, objective: str | None) -> None:
    """Raises ValueError where `objective` learns from the gradient of the reward, and this one has none."""
    if objective and not getattr(reward, "differentiable", False):
        raise ValueError(
            f"objective.kind: {objective} learns from the gradient of the reward, and {name} is not differentiable; "
            f"use dag_db, dag_kl or ddpo, or a reward that is: shapes_alignment_soft, {', '.join(MODELS)}, or "
            "your own with an attribute `differentiable = True` whose scores autograd can follow back to the images"
        )


def check_options(options: dict[Any, Any]) -> None:
    """Raises ValueError for a key that cannot be a reward's own."""
    own = ("name", "weights", "device")
    for key in options:
        if not isinstance(key, str) or not key.isidentifier() or key in own:
            raise ValueError(f"reward.options: {key!r} cannot be one; {', '.join(own)} are settings beside options")


@contextlib.contextmanager
def _named_options(name: str, options: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        raise ValueError(f"reward.options: {name}: {error}; got {', '.join(options) or 'none'}") from error


def _maker(name: str, weights: str | None, device: str) -> tuple[Any, dict[str, Any]]:
    """What makes the reward, imported only now (the reward models need transformers), and what it takes but options."""
    check_name(name)
    settings: dict[str, Any] = {"weights": weights, "device": device}
    if name in MODELS:
        place = MODELS[name]
    elif weights is not None:
        raise ValueError(f"reward.weights: {name} takes none, got {weights!r} (your own reward: use reward.options)")
    elif name == SUM:
        place, settings = "weighted_sum:WeightedSum", {"device": device}
    elif name in PLAIN:
        place, settings = PLAIN[name], {}
    else:
        return user_reward, {"name": name, "device": device}
    return pkgutil.resolve_name(f"rewards.{place}"), settings


def _import(name: str) -> Any:
    module, attribute = _place(name)
    where = "looked in the current directory and PYTHONPATH"
    with named_failure(NoReward, f"reward.name: cannot import {name!r} ({where})"):
        names = [key for key, value in vars(importlib.import_module(module)).items() if callable(value)]
        try:
            function = pkgutil.resolve_name(f"{module}:{attribute}")
        except AttributeError as error:
            close = difflib.get_close_matches(attribute, names, 1)
            there = ", ".join(key for key in names if not key.startswith("_")) or "no function"
            remedy = f"did you mean {close[0]}?" if close else f"it has {there}"
            raise AttributeError(f"{error}; {remedy}") from error
    if not callable(function):
        raise NoReward(f"reward.name: {name} is {type(function).__name__}, expected a function or a class")
    return function


class UserReward:
    """A user's own function or object, named in the config as `module:callable` or given as a Python object."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function
        self.differentiable = bool(getattr(function, "differentiable", False))
        for attribute in OPTIONAL:
            setattr(self, attribute, told(function, attribute))

    def __call__(self, images: "Tensor", prompts: Sequence[str], metadata: Sequence[Columns] = ()) -> "Tensor":
        import torch

        returned = ask(self.function, images, prompts, metadata)
        try:
            scores = returned if isinstance(returned, torch.Tensor) else torch.as_tensor(returned)
            scores = scores.to(images.device, torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(returned).__name__
            raise TypeError(f"it returned a {kind}, expected a tensor of {len(images)} scores: {error}") from error
        if scores.shape != (len(images),):
            raise ValueError(
                f"it returned shape {list(scores.shape)}, expected {[len(images)]}, a score for each image: reduce "
                "over what belongs to one image, as in .mean((1, 2, 3))"
            )
        return scores


def user_reward(name: str, device: str = "cpu", **options: Any) -> UserReward:
    """The callable `module:callable`; a class, or a function where there are options, is called with them first, and
    with the device, if it has such a parameter. Raises NoReward."""
    function = _import(name)
    if options or isinstance(function, type):
        known = parameters(function)
        any_name = not known or any(each.kind is each.VAR_KEYWORD for each in known.values())
        if unknown := [] if any_name else [option for option in options if option not in known]:
            takes = ", ".join(option for option in known if option != "device") or "none"
            raise NoReward(f"reward.options: {name} has no {', '.join(unknown)}; it takes {takes}")
        with named_failure(CannotBeMade, f"reward.name: {name} cannot be made"):
            function = function(**options, **({"device": device} if "device" in known else {}))
        if not callable(function):
            kind = type(function).__name__
            raise NoReward(f"reward.name: {name} made a {kind}, expected what takes (images, prompts)")
    known = parameters(function)
    if known and len(known) < 2 and not any(each.kind is each.VAR_POSITIONAL for each in known.values()):
        raise NoReward(
            f"reward.name: {name} takes ({', '.join(known)}), expected (images, prompts) and, if it likes, metadata"
        )
    return UserReward(name, function)
