"""What there is to do: which prompts and noise each chunk of an epoch, or of the evaluation set, gets."""

from __future__ import annotations

from collections.abc import Sequence

from diffusion import noise
from diffusion.trajectory import Chunk
from learner.config import Config


def training_chunks(config: Config, prompts: Sequence[str], epoch: int) -> list[Chunk]:
    """The epoch's chunks. Prompts come in shuffled passes over the whole set, each `per_prompt` times in a row;
    the place in that order follows from the epoch, so it needs no state."""
    size, each = config.sampler.chunk_size, config.prompts.per_prompt
    total = config.train.trajectories
    first = epoch * (total // each)
    order = [prompts[_position(config.run.seed, first + i, len(prompts))] for i in range(total // each)]
    per_trajectory = [prompt for prompt in order for _ in range(each)]
    return [
        Chunk(
            index=start // size,
            purpose="train",
            epoch=epoch,
            seed=config.run.seed,
            prompts=tuple(per_trajectory[start : start + size]),
            trajectory_ids=tuple(range(start, start + size)),
        )
        for start in range(0, total, size)
    ]


def _position(seed: int, index: int, count: int) -> int:
    """Index into the prompt set of the index-th draw: each pass of `count` draws is a fresh permutation."""
    lap, place = divmod(index, count)
    return int(noise.generator(seed, noise.PROMPTS, item=lap).permutation(count)[place])


def evaluation_chunks(config: Config, prompts: Sequence[str]) -> list[Chunk]:
    """The fixed evaluation set: the same prompts and noise before, during and after training, in every run."""
    size = config.sampler.chunk_size
    return [
        Chunk(
            index=start // size,
            purpose="evaluate",
            epoch=0,
            seed=config.evaluation.seed,
            prompts=tuple(prompts[i % len(prompts)] for i in range(start, start + size)),
            trajectory_ids=tuple(range(start, start + size)),
        )
        for start in range(0, config.evaluation.images, size)
    ]
