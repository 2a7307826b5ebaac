"""The learner's state as the files of a checkpoint: all that a resumed run needs to go on bitwise.

`learner.pt` is the same on every rank; `replay-RANK.pt` holds the rollouts that a rank may still
train on. Both hold only tensors, numbers and strings, and are read with `weights_only=True`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from diffusion.trajectory import Chunk, Scores, Trajectories
from learner.experience import Experience

LEARNER_FILE = "learner.pt"
ARRAYS = ("timesteps", "states", "log_pf", "log_pb", "selected", "model_output")


def replay_file(rank: int) -> str:
    return f"replay-{rank}.pt"


def dump(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def parse(content: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def dump_replay(replay: Iterable[Sequence[Sequence[Experience]]]) -> bytes:
    """Epochs of updates of scored trajectories."""
    return dump({"epochs": [[[_pack(experience) for experience in update] for update in epoch] for epoch in replay]})


def parse_replay(content: bytes) -> list[list[list[Experience]]]:
    return [[[_unpack(packed) for packed in update] for update in epoch] for epoch in parse(content)["epochs"]]


def _pack(experience: Experience) -> dict[str, Any]:
    trajectories = experience.trajectories
    arrays = {name: getattr(trajectories, name) for name in ARRAYS} | {"rewards": experience.scores.rewards}
    return {
        "chunk": asdict(trajectories.chunk),
        "policy_version": trajectories.policy_version,
        "adapter_sha256": trajectories.adapter_sha256,
        "prepared": _tensors(experience.prepared),
        **_tensors(arrays),
    }


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(values)) for name, values in arrays.items()}


def _unpack(packed: dict[str, Any]) -> Experience:
    chunk, arrays = Chunk(**packed["chunk"]), {name: packed[name].numpy() for name in ARRAYS}
    trajectories = Trajectories(chunk, packed["policy_version"], packed["adapter_sha256"], **arrays)
    prepared = {name: values.numpy() for name, values in packed["prepared"].items()}
    return Experience(trajectories, Scores(chunk, packed["rewards"].numpy()), prepared)
