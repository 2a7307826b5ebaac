"""Residual nabla-DB: nabla-DB against the frozen reference model (arXiv 2412.07775).

The conditions of nabla_db.py minus the reference's own; the noising kernel drops out, and what is left to learn is
g~ = grad log (F / F_ref):

    forward:  grad_{x_t'} log p_F(x_t'|x_t) = eta_p grad_{x_t'} log p_ref(x_t'|x_t) + g~(x_t')
    reverse:  grad_{x_t}  log p_F(x_t'|x_t) = eta_p grad_{x_t}  log p_ref(x_t'|x_t) - g~(x_t)

with the forward-looking g~(x_t) = h_phi(x_t) + beta gamma_t grad_{x_t} r(xhat(x_t)), and h_phi(x_0) = 0. The target is
p_ref(x_0)^eta_p exp(beta r(x_0)); eta_p is objective.pretrained_strength."""

import torch
from torch import Tensor

from learner.config.sections import Objective as Settings
from learner.objectives.base import Policy, Transitions
from learner.objectives.nabla_db import NablaDB
from learner.objectives.needs import NEEDS


class ResidualNablaDB(NablaDB):
    """Forward, reverse and terminal loss; log-probabilities are sums."""

    needs = NEEDS["residual_nabla_db"]
    target = "target proportional to p_ref{strength} x exp({beta:g} x reward)"
    terminal_loss = True

    @classmethod
    def extra_passes(cls, settings: Settings) -> int:
        return 7 - _shared(settings)  # the same, and the reference at x forward and back

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        """Beside the reward's gradients the reference's output at x, and its log p(x_next|x)'s gradient to x."""
        assert batch.clean_gradient is not None
        with torch.enable_grad():
            x = batch.x.detach().requires_grad_()
            output = policy.reference(x, batch.t, batch.embeddings)
            log_pf = self.kernel.log_pf(output, batch.t, x, batch.x_next, "sum")
            score = torch.autograd.grad(log_pf.sum(), x, retain_graph=True)[0]
            if _shared(self.settings):
                clean = self.kernel.clean(output, batch.t, x)
                gradient = torch.autograd.grad(clean, x, batch.clean_gradient.to(clean.dtype))[0]
            else:
                gradient = self.state_gradient(policy, batch)
        return {
            "gradient": gradient,
            "gradient_next": self.state_gradient(policy, batch, after=True),
            "reference_output": output.detach(),
            "reference_score": score,
        }

    def known_score(self, batch: Transitions) -> Tensor:
        """The reference's, times eta_p."""
        return self.settings.pretrained_strength * batch.prepared["reference_score"]

    def known_score_next(self, batch: Transitions) -> Tensor:
        output = batch.prepared["reference_output"]
        return self.settings.pretrained_strength * self.kernel.score_pf(output, batch.t, batch.x, batch.x_next)


class ResidualNablaDBNoFlow(ResidualNablaDB):
    """h_phi = 0: the forward loss alone. It does NOT sample p_ref exp(beta r): a cheap reward-seeking mode, measured at
    total variation 0.2 with zero loss on the exact problem."""

    needs = NEEDS["residual_nabla_db_no_flow"]
    target = "no exact target: it seeks the reward near the reference model"

    @classmethod
    def extra_passes(cls, settings: Settings) -> int:
        return 3

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        with torch.no_grad():
            output = policy.reference(batch.x, batch.t, batch.embeddings)
        return {"reference_output": output, "gradient_next": self.state_gradient(policy, batch, after=True)}


def _shared(settings: Settings) -> bool:
    """Whether the reference's pass at x also gives the clean prediction there."""
    return settings.forward_looking == "base" and settings.clean_prediction == "guided"
