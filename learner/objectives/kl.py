"""DAG-KL: the policy gradient of detailed balance (arXiv 2406.00633, Eq. 14).

-delta is what a policy is rewarded with at a transition: its score-function gradient is that of
KL(p_F(.|x_t) || p_B(x_t|.) F(.) / F(x_t)). The policy takes clipped policy-gradient steps on it, the flow network
minimises delta^2 with log p_F held fixed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from learner.objectives.base import Policy, Transitions
from learner.objectives.db import DagDB, penalty
from learner.objectives.needs import NEEDS
from learner.objectives.policy_gradient import clipped, leave_one_out

if TYPE_CHECKING:
    from learner.config.sections import Objective as Settings


class DagKL(DagDB):
    """DAG-KL (arXiv 2406.00633, Eq. 14): L = kl_weight x mean clipped policy loss + mean delta^2 with log p_F detached.
    Log-probabilities, and so the ratio, are sums or means over dimensions, as objective.log_prob_reduction says."""

    needs = NEEDS["dag_kl"]

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
