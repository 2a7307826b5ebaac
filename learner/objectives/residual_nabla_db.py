"""Residual nabla-DB: nabla-DB against the frozen reference model (arXiv 2412.07775).

The conditions of nabla_db.py minus the reference's own; the noising kernel drops out, and what is left to learn is
g~ = grad log (F / F_ref):

    forward:  grad_{x_t'} log p_F(x_t'|x_t) = eta_p grad_{x_t'} log p_ref(x_t'|x_t) + g~(x_t')
    reverse:  grad_{x_t}  log p_F(x_t'|x_t) = eta_p grad_{x_t}  log p_ref(x_t'|x_t) - g~(x_t)

with the forward-looking g~(x_t) = h_phi(x_t) + beta gamma_t grad_{x_t} r(xhat(x_t)), and h_phi(x_0) = 0. The target is
p_ref(x_0)^eta_p exp(beta r(x_0)); eta_p is objective.pretrained_strength.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from learner.objectives.base import Policy, Transitions
from learner.objectives.nabla_db import NablaDB
from learner.objectives.needs import NEEDS

if TYPE_CHECKING:
    from learner.config.sections import Objective as Settings


class ResidualNablaDB(NablaDB):
    """Residual nabla-DB (arXiv 2412.07775): forward, reverse and terminal loss; log-probabilities are sums."""

    needs = NEEDS["residual_nabla_db"]

    @staticmethod
    def target(given: Settings, dimensions: int) -> str:
        strength = "" if given.pretrained_strength == 1 else f"^{given.pretrained_strength:g}"
        return f"target proportional to p_ref{strength} x exp({given.beta:g} x reward)"

    @staticmethod
    def extra_passes(given: Settings) -> int:
        return 7 - _shared(given)  # the same, and the reference at x forward and back

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        """Beside the reward's gradients: the reference's output at x, and the gradient of its log p(x_next|x) with
        respect to x. Neither changes with training."""
        assert batch.clean_gradient is not None
        with torch.enable_grad():
            x = batch.x.detach().requires_grad_()
            output = policy.model.predict_reference(x, batch.t, batch.embeddings, policy.guidance)
            log_pf = self.kernel.log_pf(output, batch.t, x, batch.x_next, "sum")
            score = torch.autograd.grad(log_pf.sum(), x, retain_graph=True)[0]
            if _shared(self.given):
                clean = self.kernel.clean(output, batch.t, x)
                gradient = torch.autograd.grad(clean, x, batch.clean_gradient.to(clean.dtype))[0]
            else:
                gradient = self.state_gradient(policy, batch, batch.x, batch.t, batch.clean_gradient)
        return {
            "gradient": gradient,
            "gradient_next": self.state_gradient(policy, batch, batch.x_next, batch.t_next, batch.clean_gradient_next),
            "reference_output": output.detach(),
            "reference_score": score,
        }

    def loss(
        self, batch: Transitions, output: Tensor, flow: nn.Module | None, beta: float, flow_gradient: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        h, h_next = self.flow_ends(batch, flow, flow_gradient)
        g, g_next = self.values(batch, h, h_next, beta)
        reverse = self.score_of_state(batch, output) - self.given.pretrained_strength * self.reference_score(batch) + g
        return self.combine(batch, self.forward(batch, output, g_next), reverse, h_next)

    def forward(self, batch: Transitions, output: Tensor, g_next: Tensor) -> Tensor:
        """Residual [b, C, H, W] of the forward condition."""
        kernel, t, x, x_next = self.kernel, batch.t, batch.x, batch.x_next
        reference = kernel.score_pf(batch.prepared["reference_output"], t, x, x_next)
        return kernel.score_pf(output, t, x, x_next) - self.given.pretrained_strength * reference - g_next

    @staticmethod
    def reference_score(batch: Transitions) -> Tensor:
        return batch.prepared["reference_score"]


class ResidualNablaDBNoFlow(ResidualNablaDB):
    """h_phi = 0: the forward loss alone. It does NOT sample p_ref exp(beta r): a cheap reward-seeking mode, measured at
    total variation 0.2 with zero loss on the exact problem."""

    needs = NEEDS["residual_nabla_db_no_flow"]

    @staticmethod
    def target(given: Settings, dimensions: int) -> str:
        return "seeks the reward near the reference model; it does not sample from a known target"

    @staticmethod
    def extra_passes(given: Settings) -> int:
        return 3

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        with torch.no_grad():
            output = policy.model.predict_reference(batch.x, batch.t, batch.embeddings, policy.guidance)
        gradient = self.state_gradient(policy, batch, batch.x_next, batch.t_next, batch.clean_gradient_next)
        return {"reference_output": output, "gradient_next": gradient, "gradient": torch.zeros_like(gradient)}

    def loss(
        self, batch: Transitions, output: Tensor, flow: nn.Module | None, beta: float, flow_gradient: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        nothing = torch.zeros_like(batch.x)
        _, g_next = self.values(batch, nothing, nothing, beta)
        return self.combine(batch, self.forward(batch, output, g_next), None, None)


def _shared(given: Settings) -> bool:
    """Whether the reference's pass at x also gives the clean prediction there."""
    return given.forward_looking == "base" and given.clean_prediction == "guided"
