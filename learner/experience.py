"""Scored trajectories as the learner uses them: transitions gathered to batches, with what the objective prepared."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion import gpu_memory, noise
from diffusion.base_model import BaseModel
from diffusion.trajectory import Scores, Trajectories
from learner.config import Config
from learner.objectives.base import Transitions


@dataclass
class Experience:
    """One chunk's trajectories and their rewards."""

    trajectories: Trajectories
    scores: Scores
    prepared: dict[str, np.ndarray] = field(default_factory=dict)  # [B, K, ...], by selected transition

    def __len__(self) -> int:
        """Transitions to train on."""
        return self.trajectories.selected.size

    def kept(self, output: bool) -> "Experience":
        """For later epochs: a copy of what is read from the object store, which would keep all of it there. Without
        `output` the rollout's model output, a third of the bytes, goes: flow-only fits do not use it."""

        def own(record: Any) -> Any:
            arrays = {name: value.copy() for name, value in vars(record).items() if isinstance(value, np.ndarray)}
            return replace(record, **arrays)

        trajectories = self.trajectories
        if not output:
            trajectories = replace(trajectories, model_output=trajectories.model_output[:, :, :0])
        return Experience(own(trajectories), own(self.scores), self.prepared)

    def order(self, mixed: bool) -> np.ndarray:
        """Positions of the transitions in selected.ravel(), in the order they are trained on. Where they are `mixed`,
        trajectories and timesteps, it is by the chunk's own draw: the same whatever the ranks or micro-batches."""
        if not mixed:
            return np.arange(len(self))
        chunk = self.trajectories.chunk
        return noise.generator(chunk.seed, noise.GROUPS, chunk.epoch, chunk.index).permutation(len(self))

    def windows(self, size: int, group: int, mixed: bool = False) -> list[list[np.ndarray]]:
        """Positions of the micro-batches, of at most `size` transitions, in lists that hold whole groups."""
        order = self.order(mixed)
        width = max(size // group * group, group)
        windows = [order[start : start + width] for start in range(0, len(order), width)]
        return [[window[start : start + size] for start in range(0, len(window), size)] for window in windows]

    def gather(self, flat: np.ndarray, model: BaseModel, config: Config) -> Transitions:
        """The transitions at positions `flat` of selected.ravel()."""
        trajectories, objective = self.trajectories, config.objective
        row, column = np.unravel_index(flat, trajectories.selected.shape)
        step = trajectories.selected[row, column]
        settings = config.rollout_settings()
        end = settings.end or len(trajectories.timesteps)
        terminal = len(trajectories.timesteps) if settings.terminal is None else settings.terminal

        def tensor(array: np.ndarray) -> Tensor:
            moved = gpu_memory.to_device(array, model.device)
            return moved.float() if moved.dtype == torch.float16 else moved

        def gradient(step: np.ndarray) -> Tensor | None:
            """[b, C, H, W] of the reward to the clean predictions at (row, step); 0 where there is none."""
            if self.scores.gradients is None or self.scores.gradient_row is None:
                return None
            at = self.scores.gradient_row[row, step]
            selected = self.scores.gradients[at]
            selected[at < 0] = 0
            return tensor(selected)

        times = np.append(trajectories.timesteps, 0)
        # States without a reward have psi = 0 (forward_looking none, or before forward_looking_from).
        rewards = np.nan_to_num(self.scores.rewards - np.float32(objective.reward_offset or 0.0))
        return Transitions(
            x=tensor(trajectories.states[row, step]),
            x_next=tensor(trajectories.states[row, step + 1]),
            t=tensor(times[step]),
            t_next=tensor(times[step + 1]),
            trajectory_id=tensor(np.asarray(trajectories.chunk.trajectory_ids)[row]),
            embeddings=model.embed([trajectories.chunk.prompts[r] for r in row]),
            reward=tensor(rewards[row, step]),
            reward_next=tensor(rewards[row, step + 1]),
            reward_terminal=tensor(rewards[row, terminal]),
            terminal=tensor(step + 1 >= end),
            log_pf_old=tensor(trajectories.log_pf[row, step]),
            log_ref=None if trajectories.log_ref is None else tensor(trajectories.log_ref[row, step]),
            output_old=tensor(trajectories.model_output[row, column]),
            clean_gradient=gradient(step),
            clean_gradient_next=gradient(step + 1),
            prepared={name: tensor(values[row, column]) for name, values in self.prepared.items()},
        )


def concatenate(parts: Sequence[Transitions]) -> Transitions:
    """The transitions of all parts, which have the same fields, in order."""

    def joined(records: list[dict[str, Any]]) -> dict[str, Tensor]:
        names = [name for name, value in records[0].items() if isinstance(value, Tensor)]
        return {name: torch.cat([record[name] for record in records]) for name in names}

    return Transitions(**joined([vars(part) for part in parts]), prepared=joined([part.prepared for part in parts]))


def made_up(size: int, model: BaseModel, times: Sequence[int], gradients: bool) -> Transitions:
    """Transitions to measure memory with."""
    x, number = (torch.zeros(size, *shape, device=model.device) for shape in (model.latent_shape, ()))
    index, gradient = number.to(torch.int64), torch.ones_like(x) if gradients else None
    return Transitions(
        x=x, x_next=x.clone(), t=index + times[0], t_next=index + times[1], trajectory_id=index,
        embeddings=model.embed([""] * size), reward=number, reward_next=number, reward_terminal=number,
        terminal=index > 0, log_pf_old=number, output_old=x.clone(), clean_gradient=gradient,
        clean_gradient_next=gradient, log_ref=number,
        prepared={
            **dict.fromkeys(("advantage", "slope", "flow_slope", "loss_share", "target_weight"), number),
            **{name: x.clone() for name in ("adjoint", "reference_output", "log_flow_gradient")},
        },
    )  # fmt: skip
