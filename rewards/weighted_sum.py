"""Several rewards at once: the sum of each one's weight times its raw score."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, FiniteFloat, ValidationError, field_validator
from torch import Tensor

from diffusion.failures import RunFailure
from rewards import registry
from rewards.contract import Columns, Reward, call, told
from rewards.names import Normalise, wrong_normalise

Result = TypeVar("Result")
WHERE = "reward.options.terms"


class Term(BaseModel, extra="forbid", strict=True):
    name: str
    weight: FiniteFloat
    weights: str | None = None
    options: dict[str, Any] = {}

    @field_validator("options")
    @classmethod
    def _keywords(cls, options: dict[str, Any]) -> dict[str, Any]:
        registry.check_options(options)
        return options

    def load(self, device: str) -> Reward:
        return registry.load(self.name, self.weights, device, **self.options)

    def check(self, prompts: Sequence[str], objective: str | None = None) -> None:
        registry.check(self.name, self.weights, self.options, prompts, objective)


class WeightedSum:
    """sum_k weight_k * reward_k. Differentiable when every term is. `normalise` is the learner's (rewards/mixture.py):
    scores are raw."""

    name = "weighted_sum"

    def __init__(self, terms: Sequence[dict[str, Any]], device: str = "cpu", normalise: Normalise = "none") -> None:
        """`terms`: what `Term` has. Raises ValueError, which names the term that is wrong or cannot be made."""
        if fault := wrong_normalise(normalise):
            raise ValueError(fault)
        self.terms = read_terms(terms)
        self.rewards = each_term(self.terms, lambda term: term.load(device))
        rewards = self.rewards.values()
        self.differentiable = all(reward.differentiable for reward in rewards)
        self.batch = min((most for reward in rewards if (most := told(reward, "batch"))), default=None)
        self.image_only = any(told(reward, "image_only") for reward in rewards)
        self.columns = tuple(dict.fromkeys(column for reward in rewards for column in told(reward, "columns")))

    @staticmethod
    def check(prompts: Sequence[str], objective: str | None, *, terms: Any = None, normalise: Any = "none") -> None:
        """As `registry.check`, of every term; the ValueError names it."""
        if fault := wrong_normalise(normalise):
            raise ValueError(fault)
        each_term(read_terms(terms), lambda term: term.check(prompts, objective))

    def parts(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Columns] = ()) -> dict[str, Tensor]:
        """Raw scores [B] of each term, unweighted, by label: its name, with _2, _3 and so on where that is taken."""
        return {label: call(reward, images, prompts, metadata) for label, reward in self.rewards.items()}

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Columns] = ()) -> Tensor:
        return self.total(self.parts(images, prompts, metadata), images.device)

    def total(self, parts: dict[str, Tensor], device: torch.device) -> Tensor:
        """The sum [B] of `parts`."""
        return torch.stack([term.weight * parts[label].to(device) for label, term in self.terms.items()]).sum(0)


def read_terms(terms: Any, where: str = WHERE) -> dict[str, Term]:
    """By label. Raises ValueError, which names the term of the setting `where`, for what is no list of terms."""
    if not isinstance(terms, Sequence) or isinstance(terms, str) or not terms:
        raise ValueError(f"{where}: expected a list like [{{name: hpsv2, weight: 1.0}}], got {terms!r}")
    by_label: dict[str, Term] = {}
    for index, values in enumerate(terms):
        try:
            term = Term.model_validate(values)
        except ValidationError as error:
            fault, known = error.errors()[0], ", ".join(Term.model_fields)
            place = ".".join(map(str, (f"{where}[{index}]", *fault["loc"])))
            raise ValueError(f"{place}: {fault['msg']}, got {fault['input']!r}; a term has {known}") from error
        if term.name == WeightedSum.name:
            raise ValueError(f"{where}[{index}]: a sum of sums; list its terms here instead")
        names = itertools.chain([term.name], (f"{term.name}_{n}" for n in itertools.count(2)))
        by_label[next(label for label in names if label not in by_label)] = term
    return by_label


def each_term(terms: dict[str, Term], act: Callable[[Term], Result], where: str = WHERE) -> dict[str, Result]:
    """What `act` makes of each term, by label. A ValueError says from which term it came."""
    results = {}
    for index, (label, term) in enumerate(terms.items()):
        try:
            results[label] = act(term)
        except ValueError as error:
            kind = type(error) if isinstance(error, RunFailure) else ValueError
            raise kind(f"{where}[{index}] ({term.name}): {error}") from error
    return results
