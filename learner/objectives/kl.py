"""DAG-KL: the policy gradient of detailed balance (arXiv 2406.00633, Eq. 14).

-delta is what a policy is rewarded with at a transition: its score-function gradient is that of
KL(p_F(.|x_t) || p_B(x_t|.) F(.) / F(x_t)). The policy takes clipped policy-gradient steps on it, the flow network
minimises delta^2 with log p_F held fixed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learner.objectives.base import ADVANTAGE_LIMIT, Flow, Loss, Policy, Transitions
from learner.objectives.db import DagDB
from learner.objectives.needs import NEEDS


class DagKL(DagDB):
    """L = kl_weight x mean clipped policy loss + mean delta^2 with log p_F detached."""

    needs = NEEDS["dag_kl"]

    @torch.no_grad()
    def prepare_window(self, policy: Policy, batches: Sequence[Transitions], flow: Flow, beta: float) -> None:
        """Advantages of groups that are spread over micro-batches; those of whole groups come without another pass."""
        if len(batches) == 1:
            return
        raw = [-self.residual(batch, self.log_pf(batch, policy.output(batch)), flow, beta, False) for batch in batches]
        advantage = leave_one_out(torch.cat(raw), self.group)
        for batch, part in zip(batches, advantage.split([len(batch.t) for batch in batches]), strict=True):
            batch.prepared["advantage"] = part

    def loss(self, batch: Transitions, output: Tensor, flow: Flow, beta: float, flow_gradient: bool) -> Loss:
        log_pf = self.log_pf(batch, output)
        delta = self.residual(batch, log_pf.detach(), flow, beta, flow_gradient)
        advantage = batch.prepared.get("advantage")
        if advantage is None:
            advantage = leave_one_out(-delta.detach(), self.group)
        policy_loss, parts = self.policy_loss(batch, log_pf, advantage)
        balance = (self.weights(batch) * self.penalty(delta)).mean()
        # The paper multiplies the policy's gradient by the final beta, whatever this epoch's is.
        weight = self.settings.beta if self.settings.kl_weight is None else self.settings.kl_weight
        return balance + weight * policy_loss, parts | {"balance": balance, "residual_squared": delta.square().mean()}


def leave_one_out(raw: Tensor, group_size: int) -> Tensor:
    """Advantages [b]: raw [b] standardised within each run of `group_size`, an entry against the others: b_i = mean of
    the others; d_i = A_i - b_i; v_i = mean of the others' d_j^2; d_i / (sqrt(v_i) + 1e-8), clipped to +-5."""
    if group_size < 2 or len(raw) % group_size:
        raise ValueError(f"{len(raw)} transitions do not make leave-one-out groups of {group_size}")
    grouped = raw.reshape(-1, group_size)
    others = group_size - 1
    deviation = grouped - (grouped.sum(1, keepdim=True) - grouped) / others
    squared = deviation.square()
    variance = (squared.sum(1, keepdim=True) - squared) / others
    # A sum minus one of its terms can come out below zero by rounding.
    advantage = deviation / (variance.clamp(min=0).sqrt() + 1e-8)
    return advantage.clamp(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT).reshape(-1)
