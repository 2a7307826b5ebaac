"""A reward tried before a run: called once on two made-up pictures, in the driver, before any model is loaded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.contract import Columns, Reward, call, told
from rewards.own_code import named_failure
from rewards.registry import BadReward

LEFT_OUT = "if only the actors' machines can run it: reward.try_first=false"


def try_reward(
    reward: Reward, prompts: Sequence[str], metadata: Sequence[Columns], pixels: int, device: str,
    gradient: bool = False, inner: str | None = None,
) -> None:  # fmt: skip
    """Raises BadReward, in one line, for what would end a run: a reward that raises, or does not return a finite number
    for each picture; with `gradient`, where it gives none; with `inner`, the objective that asks for the rewards of
    inner states, where it judges images alone; for a prompt without a column that it needs. Raises ServiceFailed for a
    judge behind HTTP that cannot be asked. Pictures have a side of `pixels`, and the first two of the `prompts`."""
    name, rows = reward.name, metadata or [{}] * len(prompts)
    gradient &= reward.differentiable  # else whoever checks settings says it
    if hasattr(reward, "check_prompts"):
        reward.check_prompts(prompts)
    require_whole_pictures(reward, inner)
    for column in told(reward, "columns"):
        if without := [prompt for prompt, row in zip(prompts, rows, strict=True) if column not in row]:
            there = ", ".join(dict.fromkeys(key for row in rows for key in row)) or "none"
            raise BadReward(
                f"reward {name} needs a column {column!r}, which {len(without)} of {len(prompts)} prompts do not "
                f"have, the first {without[0]!r:.200}; columns beside the prompt: {there} (prompts.path)"
            )
    places = [0, 1 % len(prompts)]
    texts = [str(prompts[place]) for place in places]
    images = pictures(pixels).to(device).requires_grad_(gradient)
    for part in (reward, *getattr(reward, "rewards", {}).values()):  # of a sum
        if check_health := getattr(part, "check_health", None):
            check_health()  # a judge that is down answers no call, and after minutes
    said = f"reward {name} failed on two made-up pictures of {pixels} x {pixels} with the prompts "
    said += " and ".join(f"{text!r:.200}" for text in texts)
    with named_failure(BadReward, said), torch.set_grad_enabled(gradient):
        scores = call(reward, images, texts, [rows[place] for place in places])
        require_scores(scores)
        if gradient:
            require_gradient(scores, images)


def require_whole_pictures(reward: Reward, inner: str | None) -> None:
    """Raises BadReward where the objective `inner` asks for the rewards of inner states, and this one judges images."""
    if inner and told(reward, "image_only"):
        raise BadReward(
            f"reward {reward.name} judges finished pictures alone, and {inner} asks it at every inner state of a "
            "trajectory: set objective.forward_looking=none, or use rtb, fitted_nabla_db, grpo or ddpo, which ask once "
            "a picture"
        )


def require_scores(scores: Any) -> None:
    """Raises where these are not two finite numbers."""
    if not isinstance(scores, Tensor) or scores.shape != (2,) or not scores.is_floating_point():
        found = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise TypeError(f"it returned {found}, expected a tensor of 2 scores")
    if not scores.isfinite().all():
        raise ValueError(f"it returned {scores.tolist()}, expected finite numbers")


def require_gradient(scores: Tensor, images: Tensor) -> None:
    gradient = None
    if scores.requires_grad:
        (gradient,) = torch.autograd.grad(scores.sum(), images, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "it says that it is differentiable, but autograd finds no way from its scores back to the images (a "
            "detach, a no_grad or a step outside torch)"
        )
    if not gradient.isfinite().all():
        raise ValueError("its gradient to the images is not finite")


def pictures(pixels: int) -> Tensor:
    """[2, 3, pixels, pixels] in [0, 1]: a smooth one, and noise."""
    ramp = torch.linspace(0, 1, pixels)
    smooth = torch.stack([ramp.expand(pixels, -1), ramp[:, None].expand(-1, pixels), 0.5 * (ramp + ramp[:, None])])
    noise = torch.rand(smooth.shape, generator=torch.Generator().manual_seed(0))
    return torch.stack([smooth, noise])
