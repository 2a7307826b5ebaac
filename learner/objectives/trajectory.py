"""Losses of whole trajectories, shared by trajectory_balance.py and sub_trajectory_balance.py.

Of a trajectory's K trained transitions they see the log-ratios  l_k = log p_F(x_k+1|x_k) - log q  in nats, q being the
frozen reference's p_ref(x_k+1|x_k) (residual forms) or the noising kernel's p_B(x_k|x_k+1); the log-flows of the K
states that they start from; and a goal, beta r(x_0). Where a window of trajectories does not fit into one micro-batch,
a pass without gradient finds the loss's slope to each of these numbers, and the passes with gradient carry the slopes
to the networks: the same gradient.

Log-ratios are those of the present weights, in every update: the losses are 0 at the target whoever sampled, so they
need no importance ratio, and trajectories of earlier policies serve as well."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion.settings import Reduction
from diffusion.trajectory import Trajectories
from learner.objectives.base import Flow, Loss, Objective, Policy, Transitions


class WholeTrajectories(Objective):
    """Loss: mean over trajectories."""

    def log_q(self, batch: Transitions) -> Tensor:
        """[b] nats: here of the frozen reference."""
        return log_reference(batch, self.settings.log_prob_reduction)

    def log_flow(self, batch: Transitions, flow: Flow, beta: float) -> Tensor:
        """[b] nats, of x; 0 without a flow network."""
        return torch.zeros_like(batch.reward)

    def goal(self, batch: Transitions, beta: float) -> Tensor:
        """[b] nats, the same for all transitions of a trajectory."""
        return beta * batch.reward_terminal

    def log_q_old(self, trajectories: Trajectories) -> np.ndarray:
        """[B, N] nats, summed over dimensions: `log_q` of every transition."""
        assert trajectories.log_ref is not None
        return trajectories.log_ref

    def nats(self, trajectories: Trajectories) -> np.ndarray:
        """Log-ratios [B, K] of the rollout's weights."""
        ratio = np.take_along_axis(trajectories.log_pf - self.log_q_old(trajectories), trajectories.selected, 1)
        return ratio if self.settings.log_prob_reduction == "sum" else ratio / trajectories.states[0, 0].size

    def prepare_window(self, policy: Policy, batches: Sequence[Transitions], flow: Flow, beta: float) -> None:
        """Slopes, where trajectories are spread over micro-batches."""
        if len(batches) == 1:
            return
        with torch.no_grad():
            parts = [self.numbers(batch, policy.output(batch), flow, beta) for batch in batches]
        ratio, log_flow, goal = map(torch.cat, zip(*parts, strict=True))
        with torch.enable_grad():
            loss = self._window_loss(ratio.requires_grad_(), log_flow.requires_grad_(), goal)
            slopes = torch.autograd.grad(loss.sum(), (ratio, log_flow), materialize_grads=True, allow_unused=True)
        each = loss.detach().repeat_interleave(self.group) / self.group
        for name, values in zip(("slope", "flow_slope", "loss_share"), (*slopes, each), strict=True):
            for batch, part in zip(batches, values.split([len(batch.t) for batch in batches]), strict=True):
                batch.prepared[name] = part

    def loss(self, batch: Transitions, output: Tensor, flow: Flow, beta: float, flow_gradient: bool) -> Loss:
        ratio, log_flow, goal = self.numbers(batch, output, flow, beta)
        # A transition's weight scales how far it moves the policy, not its ratio: residuals stay what they are.
        ratio = ratio.detach() + self.weights(batch) * (ratio - ratio.detach())
        log_flow = log_flow if flow_gradient else log_flow.detach()
        if "slope" in batch.prepared:
            moved = batch.prepared["slope"] * (ratio - ratio.detach())
            moved = moved + batch.prepared["flow_slope"] * (log_flow - log_flow.detach())
            loss = self.group * (moved + batch.prepared["loss_share"]).mean()
        else:
            loss = self._window_loss(ratio, log_flow, goal).mean()
        return loss, {"balance": loss}

    def numbers(self, batch: Transitions, output: Tensor, flow: Flow, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        ratio = self.log_pf(batch, output) - self.log_q(batch)
        return ratio, self.log_flow(batch, flow, beta), self.goal(batch, beta)

    def _window_loss(self, ratio: Tensor, log_flow: Tensor, goal: Tensor) -> Tensor:
        """[n], of each trajectory, from [n K] numbers in their order."""
        ratio, log_flow, goal = (values.reshape(-1, self.group) for values in (ratio, log_flow, goal))
        delta, weights = self.residuals(ratio, log_flow, goal[:, 0])
        return (weights * self.penalty(delta)).sum(1)


def log_reference(batch: Transitions, reduction: Reduction) -> Tensor:
    """log p_ref [b] of the frozen reference, from the sampler."""
    assert batch.log_ref is not None
    return batch.log_ref if reduction == "sum" else batch.log_ref / batch.x[0].numel()
