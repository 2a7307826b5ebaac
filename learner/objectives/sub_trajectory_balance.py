"""Sub-trajectory balance (SubTB(lambda), arXiv 2209.12782; for diffusion: arXiv 2310.02679).

A segment from state i to state j of a trajectory is in balance when this is 0:

    delta_ij = log F(x_i) + sum_{i <= k < j} (log p_F(x_k+1|x_k) - log q_k) - log F(x_j),   log F(x_K) = beta r(x_0)

with q = p_ref (residual; the target is p_ref exp(beta r)) or q = p_B (DAG-DB's own target, exp(beta r)), and the
log-flow of db.py: f_phi + psi, under p_B with `sum` also what is known of it. Detailed balance passes credit back one
transition at a time, through a flow network that must first be right; segments pass it at once.

objective.segments all: every i < j, weighted by lambda^(j-i) over their sum (objective.segment_decay: towards 0 it is
detailed balance, 1 weights all alike). end: those with j = K alone, alike: their residuals need no flow but that at
their own beginning."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.trajectory import Trajectories
from learner.objectives.base import Flow, Policy, Transitions
from learner.objectives.db import known_log_flow
from learner.objectives.needs import NEEDS
from learner.objectives.trajectory import WholeTrajectories


class ResidualSubTrajectoryBalance(WholeTrajectories):
    needs = NEEDS["rsub"]
    target = "target proportional to p_ref x exp({exponent} x reward)"
    _to_end: dict[int, np.ndarray]  # by trajectory: sums [K] of the rollout's log-ratios from each transition on

    def begin_epoch(
        self, ids: Sequence[int], prompts: Sequence[str], rewards: Sequence[float], nats: np.ndarray, beta: float
    ) -> None:
        to_end = nats[:, ::-1].cumsum(1, dtype=np.float64)[:, ::-1]
        self._to_end = dict(zip(ids, to_end, strict=True))

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        """What is left of the trajectory's log-ratios, for flow-only fits."""
        first = self.settings.span(self.kernel.num_steps)[0]
        place = {t: k - first for k, t in enumerate(self.kernel.timesteps.tolist())}
        pairs = zip(batch.trajectory_id.tolist(), batch.t.tolist(), strict=True)
        values = [self._to_end[number][place[t]] for number, t in pairs]
        return {"to_end": torch.tensor(values, dtype=batch.reward.dtype, device=batch.x.device)}

    def log_flow(self, batch: Transitions, flow: Flow, beta: float) -> Tensor:
        assert flow is not None
        f = flow(batch.x.detach(), batch.t, batch.embeddings)
        return f + self.psi(batch.t, batch.reward, beta) + self.known(batch)

    def known(self, batch: Transitions) -> Tensor:
        return torch.zeros_like(batch.reward)

    def flow_loss(self, batch: Transitions, flow: nn.Module, beta: float) -> Tensor:
        """Of the segments to the end, under the rollout's log-ratios."""
        delta = self.log_flow(batch, flow, beta) + batch.prepared["to_end"] - self.goal(batch, beta)
        return self.penalty(delta).mean()

    def residuals(self, ratio: Tensor, log_flow: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        n, count = ratio.shape
        if self.settings.segments == "end":
            delta = log_flow + ratio.flip(1).cumsum(1).flip(1) - goal[:, None]
            return delta, torch.full((count,), 1 / count, dtype=ratio.dtype, device=ratio.device)
        before = torch.cat([ratio.new_zeros(n, 1), ratio.cumsum(1)], 1)  # [n, K + 1], up to each state
        start, stop = torch.triu_indices(count + 1, count + 1, 1, device=ratio.device)
        ahead = log_flow.detach() if self.settings.detach_next_flow else log_flow
        here, there = (torch.cat([values, goal[:, None]], 1) for values in (log_flow, ahead))
        weights = torch.as_tensor(self.settings.segment_decay, dtype=ratio.dtype) ** (stop - start - 1)
        return here[:, start] + before[:, stop] - before[:, start] - there[:, stop], weights / weights.sum()


class SubTrajectoryBalance(ResidualSubTrajectoryBalance):
    needs = NEEDS["sub_tb"]
    target = "target proportional to exp({exponent} x reward)"

    def log_q(self, batch: Transitions) -> Tensor:
        return self.kernel.log_pb(batch.t, batch.x, batch.x_next, self.settings.log_prob_reduction)

    def known(self, batch: Transitions) -> Tensor:
        if self.settings.log_prob_reduction == "mean":
            return torch.zeros_like(batch.reward)
        end = self.settings.span(self.kernel.num_steps)[1]
        return known_log_flow(self.kernel, end, batch.x, batch.t)

    def log_q_old(self, trajectories: Trajectories) -> np.ndarray:
        return trajectories.log_pb
