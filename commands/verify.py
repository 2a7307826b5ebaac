"""Do the published weights load and behave? `python -m learner verify [NAME ...]`, where the hub can be reached.

Development never saw them. What must hold of any of them is checked here.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from records.words import printable
from rewards import registry
from rewards.weights import BadWeights

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 192  # of the pictures; no model's own, so that they are resized
PROMPTS = ["a red square on a black background", "a photo of a dog", "a red square on a black background"]
TOLERANCE = 2e-4  # float32, another batch size; of a score beyond 1 its share


def main(arguments: Sequence[str] | None = None) -> int:
    """A line for each reward; returns 0, 1 when one does not hold, 2 when weights or the device are not to be had."""
    parser = argparse.ArgumentParser(prog="python -m learner verify", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(registry.MODELS)}; default: all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.names if name not in registry.MODELS]:
        print(f"learner.verify: {', '.join(unknown)}, expected {', '.join(registry.MODELS)}", file=sys.stderr)
        return 2
    names = args.names or registry.MODELS
    return max(report(name, functools.partial(registry.load, name, device=args.device)) for name in names)


def report(name: str, make: Callable[[], Any]) -> int:
    """Prints one line about the reward that `make` loads; 0, 1 or 2 as `main`."""
    start = time.monotonic()
    try:
        reward = make()
    except BadWeights as error:
        print(f"{name}: FAILED: {printable(str(error))}")
        return 1
    except (ValueError, RuntimeError, AssertionError) as error:  # no weights, no such device
        print(f"{name}: not verified: {printable(str(error))}", file=sys.stderr)
        return 2
    broken = "; ".join(failures(reward))
    scores = ", ".join(f"{score:.4f}" for score in reward(pictures(), PROMPTS).tolist())
    seconds = time.monotonic() - start
    outcome = f"FAILED: {broken}" if broken else "ok"
    print(f"{name}: {outcome} (scores of three test pictures: {scores}; {seconds:.0f} s)")
    return 1 if broken else 0


def pictures() -> Tensor:
    """[3, 3, SIDE, SIDE]: a red square on black, soft noise, and the square again under noise."""
    import torch

    noise = torch.empty(3, SIDE, SIDE).uniform_(0.2, 0.8, generator=torch.Generator().manual_seed(0))
    square = torch.zeros(3, SIDE, SIDE)
    square[0, SIDE // 4 : -SIDE // 4, SIDE // 4 : -SIDE // 4] = 0.9
    return torch.stack([square, noise, (square + 0.3 * (noise - 0.5)).clamp(0, 1)])


def failures(reward: Any) -> Iterator[str]:
    """What does not hold of it, in words, beside what loading has checked: every key and shape."""
    import torch

    if any(not parameter.isfinite().all() for parameter in reward.network.parameters()):
        yield "weights that are not finite"
    images = pictures()
    scores = reward(images, PROMPTS)
    if not scores.isfinite().all() or scores.dtype != torch.float32 or scores.shape != (3,):
        yield f"scores {scores.tolist()}"
        return
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    tolerance = TOLERANCE * max(1.0, scores.abs().max().item())
    far = (alone - scores).abs().max().item()
    heeds = ((reward(images[:1], PROMPTS[1:2]) - alone[:1]).abs() > tolerance).item()
    graded = images[:2].clone().requires_grad_()
    again = reward(graded, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(again.sum(), graded)
    steepest = gradient.abs().amax((1, 2, 3), keepdim=True)
    uphill = reward((graded + 2e-3 * gradient / steepest).detach().requires_grad_(), PROMPTS[:2])
    for fails, text in (
        (reward.name == "hpsv2" and scores.abs().max() > 1, f"cosines beyond 1: {scores.tolist()}"),
        (not torch.equal(scores, reward(images, PROMPTS)), "the same pictures score differently a second time"),
        (far > tolerance, f"a picture alone scores {far:.1e} off the same in a batch"),
        ((scores[0] - scores[1]).abs() < tolerance, "different pictures score alike"),
        (heeds != (reward.name != "aesthetic"), "the prompt matters" if heeds else "the prompt does not matter"),
        (not gradient.isfinite().all() or (steepest == 0).any(), "a gradient that is zero or not finite"),
        (not (uphill > again).all(), f"a small step along the gradient does not raise the score: {again.tolist()}"),
    ):
        if fails:
            yield text
