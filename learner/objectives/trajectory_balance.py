"""Trajectory balance, of whole denoising trajectories.

    residual (relative, arXiv 2405.20971):  delta = log Z_c + sum_k (log p_F - log p_ref) - beta r(x_0)
    against the noising kernel:             delta = log Z_c + log N(x_T; 0, I) + sum_k (log p_F - log p_B) - beta r(x_0)

The loss is the mean of delta^2. With delta = 0 everywhere the image's law is p_ref exp(beta r) / Z_c, or exp(beta r) /
Z_c; c is the prompt. There is no flow network, and nothing is scored but the image.

log Z_c is one number a prompt. `objective.log_z` group: the mean of beta r - sum_k (...) over the prompt's other
trajectories of the epoch, under the rollout's weights (the log-variance loss: its gradient is REINFORCE with the
advantage beta r - sum_k (...) against a baseline that leaves the trajectory out). learned: a number that moves by
log_z_rate of the way to that mean each epoch, which is the step of a gradient descent on delta^2."""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion.trajectory import Trajectories
from learner.objectives.base import Policy, Transitions
from learner.objectives.needs import NEEDS
from learner.objectives.trajectory import WholeTrajectories


class ResidualTrajectoryBalance(WholeTrajectories):
    needs = NEEDS["rtb"]
    target = "target proportional to p_ref x exp({exponent} x reward)"
    _log_z: dict[int, float]  # of the epoch's trajectories, by id

    def begin_epoch(
        self, ids: Sequence[int], prompts: Sequence[str], rewards: Sequence[float], nats: np.ndarray, beta: float
    ) -> None:
        values = beta * np.asarray(rewards, np.float64) - nats.sum(1, dtype=np.float64)
        by_prompt = defaultdict(list)
        for row, prompt in enumerate(prompts):
            by_prompt[prompt].append(row)
        log_z = np.zeros_like(values)
        for prompt, rows in by_prompt.items():
            mean = float(values[rows].mean())
            if self.settings.log_z == "learned":
                before = self.memory.get(prompt, mean)
                log_z[rows] = self.memory[prompt] = before + self.settings.log_z_rate * (mean - before)
            elif len(rows) > 1:
                log_z[rows] = (mean * len(rows) - values[rows]) / (len(rows) - 1)
            else:  # alone: nothing to compare with, and so nothing to learn
                log_z[rows] = values[rows]
        self._log_z = dict(zip(ids, log_z.tolist(), strict=True))

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        values = [self._log_z[number] for number in batch.trajectory_id.tolist()]
        return {"log_z": torch.tensor(values, dtype=batch.reward.dtype, device=batch.x.device)}

    def goal(self, batch: Transitions, beta: float) -> Tensor:
        return beta * batch.reward_terminal - batch.prepared["log_z"]

    def residuals(self, ratio: Tensor, log_flow: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        return ratio.sum(1, keepdim=True) - goal[:, None], torch.ones(1, dtype=ratio.dtype, device=ratio.device)


class TrajectoryBalance(ResidualTrajectoryBalance):
    needs = NEEDS["tb"]
    target = "target proportional to exp({exponent} x reward)"

    def log_q(self, batch: Transitions) -> Tensor:
        log_pb = self.kernel.log_pb(batch.t, batch.x, batch.x_next, self.settings.log_prob_reduction)
        each = -0.5 * (batch.x.square() + math.log(2 * math.pi)).flatten(1)
        prior = each.sum(1) if self.settings.log_prob_reduction == "sum" else each.mean(1)
        first = batch.t == self.kernel.timesteps[self.settings.span(self.kernel.num_steps)[0]]
        return log_pb - torch.where(first, prior, torch.zeros_like(prior))

    def log_q_old(self, trajectories: Trajectories) -> np.ndarray:
        first, log_q = trajectories.selected[0, 0], trajectories.log_pb.copy()
        start = trajectories.states[:, first].reshape(len(log_q), -1).astype(np.float64)
        log_q[:, first] += 0.5 * (start**2 + math.log(2 * math.pi)).sum(1)
        return log_q
