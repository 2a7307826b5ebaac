"""Bad trajectories, set aside: a reward that is no number or raises, a black image, latents that are no numbers.

`quarantine/epoch-NNNNNN-trajectory-N.json` says all that is needed to make the trajectory again, `.safetensors` has it,
`.png` its image if there is one. In its update the next good trajectory of its chunk takes its place, so that batches,
groups and ranks stay even: the mean is then over the good ones, some of them counted twice."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from safetensors.numpy import save

from diffusion.failures import RunFailure
from diffusion.trajectory import Scores, Trajectories
from records.storage import Storage

FOLDER = "quarantine"
ARRAYS = ("states", "log_pf", "log_pb")  # of the trajectories in the files


class QuarantineFull(RunFailure, RuntimeError):
    """More bad trajectories than reward.quarantine_limit allows."""


@dataclass(frozen=True)
class SetAside:
    """One bad trajectory and its files by name. The last says what made it: a write that was cut short lacks it."""

    trajectory_id: int
    files: dict[str, bytes]


def set_aside(trajectories: Trajectories, scores: Scores) -> list[SetAside]:
    """The chunk's bad trajectories."""
    chunk, bad = trajectories.chunk, []
    for row, reason in sorted(scores.bad.items()):
        number = chunk.trajectory_ids[row]
        stem = f"epoch-{chunk.epoch:06d}-trajectory-{number}"
        facts = {"reason": reason, "prompt": chunk.prompts[row], "epoch": chunk.epoch, "trajectory_id": number}
        facts |= {"policy_version": trajectories.policy_version, "adapter_sha256": trajectories.adapter_sha256}
        facts |= {"row": row, "chunk": asdict(chunk)}  # the whole batch: a rollout's last bits depend on it
        rows = {name: np.ascontiguousarray(getattr(trajectories, name)[row]) for name in ARRAYS}
        files = {f"{stem}.safetensors": save({"timesteps": trajectories.timesteps, **rows})}
        if image := scores.bad_images.get(row):
            files[f"{stem}.png"] = image
        files[f"{stem}.json"] = (json.dumps(facts, indent=1) + "\n").encode()
        bad.append(SetAside(number, files))
    return bad


def replaced(trajectories: Trajectories, scores: Scores) -> tuple[Trajectories, Scores]:
    """The chunk with the next good trajectory (after the last comes the first) in the place of each bad one."""
    if not scores.bad:
        return trajectories, scores
    chunk, index = trajectories.chunk, scores.gradient_row
    good = [row for row in range(len(scores.rewards)) if row not in scores.bad]
    rows = [next((g for g in good if g >= row), good[0]) for row in range(len(scores.rewards))]
    prompts, ids = tuple(chunk.prompts[row] for row in rows), tuple(chunk.trajectory_ids[row] for row in rows)
    chunk = replace(chunk, prompts=prompts, trajectory_ids=ids, metadata=chunk.metadata_of(rows))
    arrays = {name: getattr(trajectories, name)[rows] for name in (*ARRAYS, "selected", "model_output")}
    if trajectories.log_ref is not None:
        arrays["log_ref"] = trajectories.log_ref[rows]
    gradient_row = None if index is None else index[rows]
    parts = {label: values[rows] for label, values in scores.parts.items()}
    kept = Scores(chunk, scores.rewards[rows], gradients=scores.gradients, gradient_row=gradient_row, parts=parts)
    return replace(trajectories, chunk=chunk, **arrays), kept


def write(storage: Storage, bad: Sequence[SetAside], count: int, limit: int) -> None:
    """Write `bad`, the newest of `count` set aside so far. Raises QuarantineFull past `limit`."""
    for trajectory in bad:
        for name, content in trajectory.files.items():
            storage.write(f"{FOLDER}/{name}", content)
    if count > limit:
        raise QuarantineFull(
            f"{count} trajectories are set aside in {storage}/{FOLDER}, more than reward.quarantine_limit={limit}: "
            "look at the reasons there, and mend the reward or raise the limit"
        )
