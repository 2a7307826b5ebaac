"""The learner's state as the files of a checkpoint: all that a resumed run needs to go on bitwise.

`learner.pt` is the same on every rank; `replay-RANK.pt` holds the rollouts that a rank may still train on. Both hold
only tensors, numbers and strings, and are read with `weights_only=True`."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from diffusion.failures import RunFailure
from diffusion.trajectory import Chunk, Scores, Trajectories
from learner.experience import Experience

LEARNER_FILE = "learner.pt"
REMEDY = "remove that checkpoint, and the run goes on from the one before"


class UnusableState(RunFailure):
    """A checkpoint whose files are as its manifest says, but not a learner's."""


def replay_file(rank: int) -> str:
    return f"replay-{rank}.pt"


def dump(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def parse(content: bytes) -> dict[str, Any]:
    """Raises an UnusableState where the file is no such state."""
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the reader meets in it
        raise UnusableState(f"a file of the checkpoint holds no learner's state ({error!r:.100}): {REMEDY}") from error


def dump_replay(replay: Iterable[Sequence[Sequence[Experience]]]) -> bytes:
    """Epochs of updates of scored trajectories."""

    def pack(experience: Experience) -> dict[str, Any]:
        fields = asdict(experience.trajectories) | {"rewards": experience.scores.rewards}
        return _converted(fields | {"prepared": experience.prepared}, np.ndarray, lambda array: torch.tensor(array))

    return dump({"epochs": [[[pack(experience) for experience in update] for update in epoch] for epoch in replay]})


def parse_replay(content: bytes) -> list[list[list[Experience]]]:
    def unpack(packed: dict[str, Any]) -> Experience:
        fields = _converted(packed, torch.Tensor, torch.Tensor.numpy)
        chunk, rewards, prepared = Chunk(**fields.pop("chunk")), fields.pop("rewards"), fields.pop("prepared")
        return Experience(Trajectories(chunk, **fields), Scores(chunk, rewards), prepared)

    return [[[unpack(packed) for packed in update] for update in epoch] for epoch in parse(content)["epochs"]]


def _converted(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """With whatever is of this kind, in dicts within dicts, converted."""
    if isinstance(value, dict):
        return {name: _converted(item, kind, convert) for name, item in value.items()}
    return convert(value) if isinstance(value, kind) else value
