"""The learner's state as the files of a checkpoint: all that a resumed run needs to go on bitwise.

`learner.pt` is the same on every rank; `replay-RANK.pt` holds the rollouts that a rank's flow fits draw from. Both
hold only tensors, numbers and strings, and are read with `weights_only=True`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from diffusion.trajectory import Chunk, Scores, Trajectories

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


def dump_replay(replay: Iterable[Sequence[tuple[Trajectories, Scores]]]) -> bytes:
    """Epochs of scored trajectories."""
    return dump({"epochs": [[_pack(*scored) for scored in epoch] for epoch in replay]})


def parse_replay(content: bytes) -> list[list[tuple[Trajectories, Scores]]]:
    return [[_unpack(scored) for scored in epoch] for epoch in parse(content)["epochs"]]


def _pack(trajectories: Trajectories, scores: Scores) -> dict[str, Any]:
    return {
        "chunk": asdict(trajectories.chunk),
        "policy_version": trajectories.policy_version,
        "adapter_sha256": trajectories.adapter_sha256,
        "rewards": torch.from_numpy(np.array(scores.rewards)),
        **{name: torch.from_numpy(np.array(getattr(trajectories, name))) for name in ARRAYS},
    }


def _unpack(packed: dict[str, Any]) -> tuple[Trajectories, Scores]:
    chunk = Chunk(**packed["chunk"])
    arrays = {name: packed[name].numpy() for name in ARRAYS}
    trajectories = Trajectories(chunk, packed["policy_version"], packed["adapter_sha256"], **arrays)
    return trajectories, Scores(chunk, packed["rewards"].numpy())
