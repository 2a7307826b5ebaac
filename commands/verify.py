"""Do the published weights load and behave? `python -m rewards.verify [NAME ...]`, where the hub can be reached.

Development never saw the real weights: the code was proven equal to its authors' own at tiny sizes. What must hold of
any ImageReward, HPSv2 or aesthetic predictor is checked here on the real ones.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rewards import registry
from rewards.weights import BadWeights, WeightsNotFound

if TYPE_CHECKING:
    from torch import Tensor

PARAMETERS = {"aesthetic": 304_894_177, "hpsv2": 986_109_441, "imagereward": 446_206_689}  # at the published sizes
SIDE = 192  # of the pictures; no model's own, so that they are resized
PROMPTS = ["a red square on a black background", "a photo of a dog", "a red square on a black background"]
TOLERANCE = 2e-4  # float32, another batch size


def main(arguments: Sequence[str] | None = None) -> int:
    """A line for each reward; returns 0, 1 when one does not hold, 2 when weights are not to be had."""
    parser = argparse.ArgumentParser(prog="python -m rewards.verify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(registry.MODELS)}; default: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args(arguments)
    try:
        if unknown := [name for name in args.names if name not in registry.MODELS]:
            raise ValueError(f"{', '.join(unknown)}, expected {', '.join(registry.MODELS)}")
        registry.check_device(args.device)
    except ValueError as error:
        print(f"rewards.verify: {error}", file=sys.stderr)
        return 2
    names = args.names or registry.MODELS
    return max(report(name, functools.partial(registry.load, name, device=args.device)) for name in names)


def report(name: str, make: Callable[[], Any], sizes: dict[str, int] | None = None) -> int:
    """Prints one line about the reward that `make` loads; 0, 1 or 2 as `main`."""
    start = time.monotonic()
    try:
        reward = make()
    except WeightsNotFound as error:
        print(f"{name}: not verified: {error}", file=sys.stderr)
        return 2
    except BadWeights as error:
        print(f"{name}: FAILED: {error}")
        return 1
    broken = list(failures(reward, (sizes or PARAMETERS)[name]))
    scores = ", ".join(f"{score:.4f}" for score in reward(pictures(), PROMPTS).tolist())
    found = f"FAILED: {'; '.join(broken)}" if broken else "ok"
    print(f"{name}: {found} (scores of three test pictures: {scores}; {time.monotonic() - start:.0f} s)")
    return 1 if broken else 0


def pictures() -> Tensor:
    """[3, 3, SIDE, SIDE]: a red square on black, soft noise, and the square again under noise."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    square = np.zeros((3, SIDE, SIDE), np.float32)
    square[0, SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4] = 0.9
    noise = rng.uniform(0.2, 0.8, (3, SIDE, SIDE)).astype(np.float32)
    return torch.from_numpy(np.stack([square, noise, np.clip(square + 0.3 * (noise - 0.5), 0, 1)]))


def failures(reward: Any, parameters: int) -> Iterator[str]:
    """What does not hold of it, in words."""
    import torch

    images = pictures()
    count = sum(parameter.numel() for parameter in reward.network.parameters())
    if count != parameters:
        yield f"{count} parameters, expected {parameters}"
    if any(not parameter.isfinite().all() for parameter in reward.network.parameters()):
        yield "weights that are not finite"
    scores = reward(images, PROMPTS)
    if not scores.isfinite().all() or scores.dtype != torch.float32 or scores.shape != (3,):
        yield f"scores {scores.tolist()}"
        return
    if reward.name == "hpsv2" and scores.abs().max() > 1:
        yield f"cosines beyond 1: {scores.tolist()}"
    if not torch.equal(scores, reward(images, PROMPTS)):
        yield "the same pictures score differently a second time"
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    if (far := (alone - scores).abs().max().item()) > TOLERANCE:
        yield f"a picture alone scores {far:.1e} off the same in a batch"
    if (far := (scores[0] - scores[1]).abs().item()) < TOLERANCE:
        yield "different pictures score alike"
    other = reward(images[:1], PROMPTS[1:2])
    heeds = (other - alone[:1]).abs().item() > TOLERANCE
    if heeds != (reward.name != "aesthetic"):
        yield "the prompt does not matter" if not heeds else "the prompt matters"
    graded = images[:2].clone().requires_grad_()
    again = reward(graded, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(again.sum(), graded)
    if not gradient.isfinite().all() or (gradient.abs().amax((1, 2, 3)) == 0).any():
        yield "a gradient to the images that is zero or not finite"
    step = 2e-3 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True)
    uphill = reward((graded + step).detach().requires_grad_(), PROMPTS[:2])
    if not (uphill > again).all():
        yield f"a small step along the gradient does not raise the score: {again.tolist()} to {uphill.tolist()}"
