"""What a reward is, and how one is called. Imports no torch by itself."""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Columns = Mapping[str, Any]  # of one prompt: the other columns of its line in the prompt file, JSON values


class Reward(Protocol):
    """Beside these two a reward may say more about itself: OPTIONAL."""

    name: str
    differentiable: bool  # autograd reaches the images

    def __call__(self, images: "Tensor", prompts: Sequence[str]) -> "Tensor":
        """images [B, 3, H, W] float in [0, 1], B prompts -> raw scores [B] float32. With a parameter `metadata` it also
        gets each prompt's `Columns`, B dicts."""
        ...


OPTIONAL: dict[str, Any] = {
    "batch": None,  # most images that it takes at once
    "range": None,  # (lowest, highest): a score outside is a fault
    "image_only": False,  # it judges finished pictures alone: inner states' clean predictions are not for it
    "columns": (),  # metadata that it needs of every prompt
}


class Row(dict[str, Any]):
    """One prompt's metadata, as a reward gets it. A column that is not there is named, with those that are."""

    def __missing__(self, column: str) -> Any:
        raise KeyError(f"the prompt has no column {column!r}; it has {', '.join(self) or 'none'} (prompts.path)")


def told(reward: Any, name: str) -> Any:
    """What a reward says of itself, by a name of OPTIONAL."""
    value = getattr(reward, name, None)
    return OPTIONAL[name] if value is None else value


def takes_metadata(reward: Any) -> bool:
    """Whether it has a parameter of that name."""
    return "metadata" in parameters(reward)


def parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    """Of a function or an object that is called; none where Python cannot tell."""
    try:
        return inspect.signature(getattr(function, "forward", function)).parameters  # a torch module's
    except (TypeError, ValueError):
        return {}


def ask(reward: Any, images: "Tensor", prompts: Sequence[str], metadata: Sequence[Columns] = ()) -> Any:
    """What it returns of these, whatever that is. No `metadata`: no prompt has any."""
    if takes_metadata(reward):
        return reward(images, prompts, metadata=[Row(row) for row in metadata or [{}] * len(prompts)])
    return reward(images, prompts)


def call(reward: Any, images: "Tensor", prompts: Sequence[str], metadata: Sequence[Columns] = ()) -> Any:
    """Scores [B], as `ask`. Raises ValueError for one outside of the reward's range."""
    scores = ask(reward, images, prompts, metadata)
    if limits := told(reward, "range"):
        outside = scores[(scores < limits[0]) | (scores > limits[1])]  # NaN is not: the scorer says that
        if len(outside):
            raise ValueError(f"it returned {outside[0]:g}, outside of its range, {limits[0]:g} to {limits[1]:g}")
    return scores
