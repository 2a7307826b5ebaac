"""DAG-KL: the policy gradient of detailed balance (arXiv 2406.00633, Eq. 14).

-delta is what a policy is rewarded with at a transition: its score-function gradient is that of
KL(p_F(.|x_t) || p_B(x_t|.) F(.) / F(x_t)). The policy takes clipped policy-gradient steps on it, the flow network
minimises delta^2 with log p_F held fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from learner.objectives.base import Policy, Transitions
from learner.objectives.db import DagDB, penalty

if TYPE_CHECKING:
    from learner.sections import Objective as Settings

ADVANTAGE_LIMIT = 5.0
TINY = 1e-8
FAR = 20.0  # nats


def leave_one_out(raw: Tensor, group_size: int) -> Tensor:
    """Advantages [b]: raw [b] standardised within each run of `group_size`, an entry against the others.

    b_i = mean of the others; d_i = A_i - b_i; v_i = mean of the others' d_j^2; d_i / (sqrt(v_i) + 1e-8), clipped to
    +-5. The published code does this over its micro-batch of 8, different prompts and timesteps mixed.

    Raises:
        ValueError: b is no multiple of group_size, or group_size < 2.
    """
    if group_size < 2 or len(raw) % group_size:
        raise ValueError(f"{len(raw)} transitions do not make leave-one-out groups of {group_size}")
    grouped = raw.reshape(-1, group_size)
    others = group_size - 1
    deviation = grouped - (grouped.sum(1, keepdim=True) - grouped) / others
    squared = deviation.square()
    variance = (squared.sum(1, keepdim=True) - squared) / others
    # A sum minus one of its terms can come out below zero by rounding.
    advantage = deviation / (variance.clamp(min=0).sqrt() + TINY)
    return advantage.clamp(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT).reshape(-1)


def clipped(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Clipped policy-gradient loss [b] (its gradient is zero where the clip binds), and whether the ratio
    exp(log_ratio) is outside of 1 +- clip_range [b] bool. `advantage` must carry no gradient."""
    ratio = log_ratio.clamp(max=FAR).exp()  # beyond any clip; exp would overflow to a gradient of 0 x inf
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * bounded), (ratio.detach() - 1).abs() > clip_range


class DagKL(DagDB):
    """DAG-KL (arXiv 2406.00633, Eq. 14): L = kl_weight x mean clipped policy loss + mean delta^2 with log p_F detached.
    Log-probabilities, and so the ratio, are sums or means over dimensions, as objective.log_prob_reduction says."""

    uses_ratio = True
    off_policy = False  # the score-function gradient is only right for the policy's own samples, within the clip
    settings: ClassVar[Mapping[str, Mapping[str, Any]]] = DagDB.settings

    @property
    def group(self) -> int:
        return self.given.group_size

    @staticmethod
    def extra_passes(given: Settings) -> int:
        return int(given.old_log_prob == "learner")

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        return self.recomputed_log_pf(policy, batch)

    def raw_advantage(self, batch: Transitions, output: Tensor, flow: nn.Module | None, beta: float) -> Tensor:
        log_pf = self.kernel.log_pf(output, batch.t, batch.x, batch.x_next, self.given.log_prob_reduction)
        return -self.residual(batch, log_pf, flow, beta, flow_gradient=False).detach()

    def advantages(self, raw: Tensor) -> Tensor:
        return leave_one_out(raw, self.given.group_size)

    def loss(
        self, batch: Transitions, output: Tensor, flow: nn.Module | None, beta: float, flow_gradient: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        given = self.given
        log_pf = self.kernel.log_pf(output, batch.t, batch.x, batch.x_next, given.log_prob_reduction)
        delta = self.residual(batch, log_pf.detach(), flow, beta, flow_gradient)
        advantage = batch.prepared.get("advantage")
        if advantage is None:
            advantage = self.advantages(-delta.detach())
        each, outside = clipped(log_pf - self.log_pf_old(batch), advantage, given.clip_range)
        weights = self.weights(batch)
        policy_loss = (weights * each).mean()
        balance = (weights * penalty(delta, given.penalty, given.huber_width)).mean()
        # The paper multiplies the policy's gradient by the final beta, whatever this epoch's is.
        weight = given.beta if given.kl_weight is None else given.kl_weight
        parts = {
            "balance": balance, "policy_loss": policy_loss, "clipped": outside.float().mean(),
            "residual_squared": delta.square().mean(),
        }  # fmt: skip
        return balance + weight * policy_loss, parts
