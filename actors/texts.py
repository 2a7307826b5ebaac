"""The actor that embeds prompts, before all others start: its text encoders may need a whole GPU. The driver puts what
it makes into the object store, where it outlives the actor; samplers and learner ranks fetch what they read."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import ray

from actors.crew import Crew
from actors.shells import TextActor
from cluster.nodes import alive_nodes
from cluster.placement import Share, ready
from cluster.waits import get, put
from learner import build, embeddings
from learner.config import Config

PORTION = 16  # prompts of one call
WHAT = "embedding prompts"


class Stored(Mapping[str, np.ndarray]):
    """Rows by prompt, each fetched when it is asked for."""

    def __init__(self, refs: Mapping[str, ray.ObjectRef], seconds: float) -> None:
        self._refs, self._seconds = refs, seconds

    def __getitem__(self, prompt: str) -> np.ndarray:
        return get(self._refs[prompt], self._seconds, "a prompt's embedding", "run.chunk_seconds")

    def __iter__(self) -> Iterator[str]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)


def prepare(
    crew: Crew, progress: Callable[[int, int], None] = lambda done, total: None
) -> Callable[[build.Parts], build.Parts]:
    """Embed the prompts, where the text encoders are large: what to make of parts, so that they have none. `progress`
    hears how many prompts are embedded, of how many. Raises ActorDied, DeadlineExceeded, ObjectLost and what the
    encoders do."""
    config = crew.config
    if not embeddings.once(config):
        return lambda parts: parts
    found = embeddings.embedded(config, partial(_encode, crew), progress)
    refs = {prompt: put(rows, WHAT) for prompt, rows in found}
    return lambda parts: parts.with_embedded(Stored(refs, config.run.chunk_seconds))


def _encode(crew: Crew, prompts: Sequence[str]) -> Iterator[np.ndarray]:
    """By an actor that is there for this alone."""
    run, share = crew.config.run, _share(crew.config)
    actor = crew.spawn("text encoder", TextActor, share.spread, partial(build.build_text_encoders, crew.config), False)
    deadline = time.monotonic() + run.ready_seconds
    ready({"text encoder": (share, [actor.ready.remote()])}, deadline, run.ready_seconds)
    for start in range(0, len(prompts), PORTION):
        portion = prompts[start : start + PORTION]
        yield from get(actor.embed.remote(portion), run.ready_seconds, WHAT, "run.ready_seconds")
    ray.kill(actor)


def _share(config: Config) -> Share:
    """A whole GPU, where there is one for samplers, or will be."""
    nodes = [node for node in alive_nodes() if node.matches(config.sampler.labels)]
    with_gpu = [node for node in nodes if node.gpus >= 1]
    coming = config.run.autoscale and config.model.device == "cuda"
    gpus = float(config.model.device != "cpu" and bool(with_gpu or coming))
    cpus = max((node.cpus for node in (with_gpu if gpus else nodes)), default=1.0)
    return Share(1, min(1.0, cpus), gpus, config.sampler.labels)
