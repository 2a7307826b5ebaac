"""Several rewards at once: the sum of each one's weight times its raw score."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion.failures import RunFailure
from rewards import registry

KEYS = ("name", "weight", "weights", "options")
WHERE = "reward.options.terms"


@dataclass(frozen=True)
class Term:
    """One reward of a sum. `label` is its name, made unique within the sum."""

    label: str
    name: str
    weight: float
    weights: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


class WeightedSum:
    """sum_k weight_k * reward_k. Differentiable when every term is."""

    name = "weighted_sum"

    def __init__(self, terms: Sequence[dict[str, Any]], device: str = "cpu") -> None:
        """`terms`: [{"name": ..., "weight": ..., "weights": ..., "options": {...}}, ...], the last two as `load` takes
        them, where there are any.

        Raises:
            ValueError: names the term that is wrong, or whose reward cannot be made.
        """
        self.terms = read_terms(terms)
        self.rewards = []
        for index, term in enumerate(self.terms):
            with naming(index, term):
                self.rewards.append(registry.load(term.name, term.weights, device, **term.options))
        self.differentiable = all(reward.differentiable for reward in self.rewards)

    def parts(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Raw scores [B] of each term, unweighted, by label: its name, with _2, _3 and so on where that is taken."""
        return {term.label: reward(images, prompts) for term, reward in zip(self.terms, self.rewards, strict=True)}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images [B, 3, H, W] in [0, 1], B prompts -> [B] on the images' device."""
        return self.total(self.parts(images, prompts), images.device)

    def total(self, parts: dict[str, Tensor], device: torch.device) -> Tensor:
        """The sum [B] of `parts`."""
        return torch.stack([term.weight * parts[term.label].to(device) for term in self.terms]).sum(0)

    @staticmethod
    def check_terms(options: dict[str, Any], prompts: Sequence[str], objective: str | None) -> None:
        """As `registry.check`, of every term.

        Raises:
            ValueError: names the term.
        """
        if extra := set(options) - {"terms"}:
            raise ValueError(f"reward.options: weighted_sum takes terms alone, got {', '.join(sorted(extra))}")
        for index, term in enumerate(read_terms(options.get("terms"))):
            with naming(index, term):
                registry.check(term.name, term.weights, term.options, prompts, objective)


@contextlib.contextmanager
def naming(index: int, term: Term, where: str = WHERE) -> Iterator[None]:
    """Says in a ValueError from which term it came."""
    try:
        yield
    except ValueError as error:
        kind = type(error) if isinstance(error, RunFailure) else ValueError
        raise kind(f"{where}[{index}] ({term.name}): {error}") from error


def read_terms(terms: Any, key: str = WHERE) -> list[Term]:
    """
    Raises:
        ValueError: no list of terms, or one without name, with a weight that is not a number, or with other keys.
    """
    if not isinstance(terms, Sequence) or isinstance(terms, str) or not terms:
        raise ValueError(f"{key}: expected a list like [{{name: hpsv2, weight: 1.0}}], got {terms!r}")
    read: list[Term] = []
    for index, term in enumerate(terms):
        where = f"{key}[{index}]"
        if not isinstance(term, dict) or not isinstance(name := term.get("name"), str):
            raise ValueError(f"{where}: expected {{name, weight, weights?, options?}}, got {term!r}")
        if extra := [str(key) for key in term if key not in KEYS]:
            raise ValueError(f"{where}: unknown keys {', '.join(extra)}; known: {', '.join(KEYS)}")
        weight, weights, options = term.get("weight"), term.get("weights"), term.get("options") or {}
        number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
        for field_name, fits, expected in (
            ("weight", number, "a number"),
            ("weights", weights is None or isinstance(weights, str), "a path or hub id"),
            ("options", isinstance(options, dict), "keyword arguments"),
        ):
            if not fits:
                raise ValueError(f"{where}.{field_name}: expected {expected}, got {term.get(field_name)!r}")
        try:
            registry.check_options(options)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if name == WeightedSum.name:
            raise ValueError(f"{where}: a sum of sums; list its terms here instead")
        taken = {other.label for other in read}
        label = next(label for n in itertools.count(1) if (label := name if n == 1 else f"{name}_{n}") not in taken)
        read.append(Term(label, name, float(term["weight"]), weights, options))
    return read
