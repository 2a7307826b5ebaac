"""Where a reward is settled: the share Var(E[r | x_k]) / Var(r) of a reward's variance that is decided in state k of a
path of the base model, 0 to N, by nested continuations. `objective.window: auto` trains the transitions until
window_share of it is.

STARTS paths are drawn, and from each measured state of each BRANCHES - 1 that go on with other noise. One-way analysis
of variance, within prompts: groups are the paths that share a state. The share's bias is of order 1 / STARTS; near 0 it
may come out below it. Its interval is the jackknife's over starts, of the logarithm of the ratio of mean squares, on
whose scale a share near 0 or 1 errs alike on both sides (tests/evaluation/test_settling.py has how often it holds).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from diffusion.failures import RunFailure
from diffusion.snapshot import Snapshot, digest
from diffusion.trajectory import Chunk
from evaluation.adapters import drawing
from evaluation.image_sets import Cache, ImageSet, Pools
from learner.config import Config, resolve
from learner.config.sections import Evaluation, LoraConfig
from learner.protocol.chunks import continuation_chunks
from records.run_folder import IMAGES, read_parquet

# A share of .95 errs by .01, one of .3 by .08. For the same work more branches err more near 1, fewer near 0.
STARTS, BRANCHES = 64, 3
STATES = 10  # are measured at most, evenly spread: of 50 steps every fifth
PROMPTS = 8  # are drawn at most, evenly spread: so that each has starts enough to compare
LEVEL, TINY = 0.95, 1e-12
DOING = "measuring where the reward is settled"


class NothingToSettle(RunFailure, ValueError):
    """The base model's pictures all have one reward."""


@dataclass(frozen=True)
class Continuations(ImageSet):
    """The paths that are drawn, by the base model; only their rewards are kept."""

    pixels: ClassVar[int] = 0

    @property
    def states(self) -> list[int]:
        """That are measured. Where no noise is added any more, all is settled."""
        noisy = self.config.noise_steps
        return sorted({round(state) for state in np.linspace(0, noisy, min(noisy, STATES), endpoint=False)})

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "starts": STARTS, "branches": BRANCHES, "states": self.states}

    def chunks(self) -> list[Chunk]:
        return continuation_chunks(self.config, self.prompts, STARTS, self.states, BRANCHES)

    @property
    def pictures(self) -> int:
        return STARTS * (1 + (BRANCHES - 1) * len(self.states))

    @property
    def transitions(self) -> int:
        """That are drawn in all: what paths share is drawn once."""
        steps = self.config.sampler.steps
        return STARTS * (steps + (BRANCHES - 1) * sum(steps - state for state in self.states))


def continuations(config: Config, prompts: Sequence[str]) -> Continuations:
    """Of a run of this config. Until its window is known, noise is added in all transitions."""
    return Continuations(*of_the_base(config, prompts, PROMPTS))


def of_the_base(config: Config, prompts: Sequence[str], most: int) -> tuple[Config, tuple[str, ...], Snapshot]:
    """What the base model of a run needs to draw some of its prompts, at most so many, evenly spread."""
    import torch

    from diffusion import lora
    from diffusion.parts import without_weights

    unet, _ = without_weights(str(resolve(config.model.path)))
    with torch.device("meta"):
        lora.attach(unet, 1, 1)
    nothing = np.zeros(sum(parameter.numel() for _, parameter in lora.named(unet)), np.float32)
    count = min(most, len(prompts))
    chosen = tuple(prompts[i * len(prompts) // count] for i in range(count))
    drawn = drawing(config, chosen, Evaluation(images=0, seed=config.evaluation.seed), LoraConfig(rank=1, alpha=1))
    drawn = drawn.model_copy(update={"model": config.model.model_copy(update={"compile": False})})  # widths vary
    return drawn, chosen, Snapshot(0, nothing, digest(nothing))


def measure(
    wanted: Continuations, cache: Cache, pools: Callable[[], Pools], progress: Callable[[str, int, int], None]
) -> list[dict[str, float]]:
    """{state, share, low, high} of each measured state and of the last, where all is settled. Raises NothingToSettle,
    and what sampling and scoring do. `pools` are started if a chunk is not in the cache."""
    content = cache.make(wanted, pools, lambda done, total: progress(DOING, done, total))
    table = read_parquet(content, "the paths", IMAGES, ("number", "reward"))
    chunks = [(chunk, row) for chunk in wanted.chunks() for row in range(len(chunk.prompts))]
    rewards = dict(zip(table["number"].to_pylist(), table["reward"].to_pylist(), strict=True))
    each, profile = len(chunks) // STARTS, list[dict[str, float]]()
    values = np.array([rewards[number] for number in range(len(chunks))], np.float64).reshape(STARTS, each)
    prompts = [wanted.prompts[start % len(wanted.prompts)] for start in range(STARTS)]
    for place, state in enumerate(wanted.states):
        first = 1 + place * (BRANCHES - 1)
        group = np.concatenate([values[:, :1], values[:, first : first + BRANCHES - 1]], 1)
        share, low, high = settled_share(group, prompts)
        profile.append({"state": state, "share": share, "low": low, "high": high})
    end = wanted.config.noise_steps
    return [*profile, {"state": end, "share": 1.0, "low": 1.0, "high": 1.0}]


def settled_share(rewards: np.ndarray, prompts: Sequence[str]) -> tuple[float, float, float]:
    """The share and its interval, from rewards [S, C] of C paths that share a state, for S states of which `prompts`
    names each one's prompt. States with a bad picture are left out. Raises NothingToSettle."""
    from scipy.stats import t  # it takes a second

    names, good = np.unique(prompts, return_inverse=True)[1], np.isfinite(rewards).all(1)
    kept = good & (np.bincount(names, good)[names] > 1)  # a prompt's only one says nothing
    rewards, strata = rewards[kept], np.unique(names[kept], return_inverse=True)[1]
    if not len(rewards) or np.ptp(rewards) == 0:
        why = "all have one reward" if len(rewards) else "are too few good ones of a prompt"
        raise NothingToSettle(f"the base model's pictures {why}: give objective.window as [first, last]")
    branches, degrees = rewards.shape[1], len(rewards) - int(strata.max()) - 1
    value = _ratio(rewards, strata)
    others = np.array([_ratio(np.delete(rewards, i, 0), np.delete(strata, i)) for i in range(len(rewards))])
    sizes = np.bincount(strata)
    apart = others - (np.bincount(strata, others) / sizes)[strata]
    reach = t.ppf((1 + LEVEL) / 2, degrees) * np.sqrt(((1 - 1 / sizes[strata]) * apart**2).sum())
    ratios = np.exp([value, value - reach, value + reach])
    share, low, high = ((ratios - 1) / (ratios + branches - 1)).tolist()
    return share, low, high


def _ratio(rewards: np.ndarray, strata: np.ndarray) -> float:
    """Logarithm of the mean square between the states of a prompt over that within a state."""
    means, sizes = rewards.mean(1), np.bincount(strata)
    apart = means - (np.bincount(strata, means) / sizes)[strata]
    between = rewards.shape[1] * (apart**2).sum() / (len(means) - len(sizes))
    within = rewards.var(1, ddof=1).mean()
    least = TINY * (between + within)
    return float(np.log(max(between, least) / max(within, least)))


def window(profile: Sequence[dict[str, float]], share: float) -> tuple[int, int]:
    """First and last transition to train: until the first state at which `share` is settled."""
    return 0, max(1, int(next(each["state"] for each in profile if each["share"] >= share))) - 1


def table(profile: Sequence[dict[str, float]], share: float) -> list[str]:
    """In words, a line each."""
    lines = ["state   settled   95 % interval"]
    lines += [
        f"{each['state']:5.0f}   {each['share']:7.3f}   {each['low']:.3f} to {each['high']:.3f}" for each in profile
    ]
    first, last = window(profile, share)
    return [*lines, f"transitions {first} to {last} settle {share:g} of it: objective.window=[{first}, {last}]"]
