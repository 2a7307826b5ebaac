"""What there is to do: which prompts and noise each chunk of an epoch, or of the evaluation set, gets."""

from collections.abc import Sequence

from diffusion import noise
from diffusion.trajectory import Chunk, Purpose
from learner.config import Config
from learner.prompts import metadata_of

CONTINUED = 1  # in place of the evaluation set's epoch 0: other noise


def training_chunks(config: Config, prompts: Sequence[str], epoch: int) -> list[Chunk]:
    """Of one epoch: prompts come in shuffled passes over the set, each `per_prompt` times in a row, without a state."""
    seed, each = config.run.seed, config.prompts.per_prompt
    draws = config.train.trajectories // each
    order = []
    for index in range(epoch * draws, (epoch + 1) * draws):
        lap, place = divmod(index, len(prompts))
        order += [prompts[noise.generator(seed, noise.PROMPTS, item=lap).permutation(len(prompts))[place]]] * each
    return _cut(order, config.sampler.chunk_size, "train", epoch, seed)


def evaluation_chunks(config: Config, prompts: Sequence[str]) -> list[Chunk]:
    """The fixed evaluation set, in whole chunks: the same prompts and noise at every time, in every run."""
    size = config.sampler.chunk_size
    count = -(-config.evaluation.images // size) * size
    return _cut([prompts[i % len(prompts)] for i in range(count)], size, "evaluate", 0, config.evaluation.seed)


def continuation_chunks(
    config: Config, prompts: Sequence[str], starts: int, states: Sequence[int], branches: int
) -> list[Chunk]:
    """`starts` trajectories, their prompts in turn, and for each of the states branches - 1 that go on from there with
    other noise, numbered one after the other: `forks` says from where."""
    each = 1 + len(states) * (branches - 1)
    forks = [max(states), *(state for state in states for _ in range(branches - 1))]
    ids, size, seed = range(starts * each), config.sampler.chunk_size, config.evaluation.seed
    chunks = []
    for index, rows in enumerate(ids[start : start + size] for start in range(0, len(ids), size)):
        chosen = [prompts[row // each % len(prompts)] for row in rows]
        parents, at = tuple(row // each * each for row in rows), tuple(forks[row % each] for row in rows)
        texts, metadata = tuple(map(str, chosen)), metadata_of(chosen)
        chunks.append(Chunk(index, "evaluate", CONTINUED, seed, texts, tuple(rows), parents, at, metadata))
    return chunks


def _cut(prompts: Sequence[str], size: int, purpose: Purpose, epoch: int, seed: int) -> list[Chunk]:
    """A trajectory of each prompt, numbered from 0, in chunks of `size`."""
    chunks = []
    for i, start in enumerate(range(0, len(prompts), size)):
        part, ids = prompts[start : start + size], tuple(range(start, start + size))
        chunks.append(Chunk(i, purpose, epoch, seed, tuple(map(str, part)), ids, metadata=metadata_of(part)))
    return chunks
