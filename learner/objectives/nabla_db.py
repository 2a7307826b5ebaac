"""nabla-DB: the gradients of detailed balance (arXiv 2412.07775).

Differentiating the balance of a transition x_t -> x_t' (see db.py) with respect to either end gives two conditions on
g(x_t) = grad_{x_t} log F(x_t):

    forward  (by x_t'):  grad log p_F(x_t'|x_t) = grad log p_B(x_t|x_t') + g(x_t')
    reverse  (by x_t):   grad log p_F(x_t'|x_t) = grad log p_B(x_t|x_t') - g(x_t)

with g(x_0) = beta grad r(x_0) at the end. Forward-looking, g(x_t) = h_phi(x_t) + beta gamma_t grad_{x_t} r(xhat(x_t)):
any fixed vector field may be added to h_phi, as long as both conditions see the same. Log-probabilities are summed over
dimensions, so beta is the true exponent: the target is exp(beta r). Losses are means over dimensions."""

import torch
from torch import Tensor

from learner.config.sections import Objective as Settings
from learner.objectives.base import Flow, Loss, Objective, Policy, Transitions, both_ends
from learner.objectives.needs import NEEDS


def mean_square(residual: Tensor) -> Tensor:
    """[b], over dimensions (not a sum) of the residual [b, C, H, W]."""
    return residual.square().flatten(1).mean(1)


class NablaDB(Objective):
    """Forward and reverse loss. The forward loss trains the policy (and, as published, the flow), the reverse loss the
    flow alone: as in the published code no gradient goes through the policy's score with respect to x_t."""

    needs = NEEDS["nabla_db"]
    target = "target proportional to exp({beta:g} x reward), whatever the base model's own density"
    terminal_loss = False  # whether h_phi(x_0) is pulled to 0

    @classmethod
    def extra_passes(cls, settings: Settings) -> int:
        # Forward and back at both ends, once more back for the score with respect to x, and forward again for scores.
        return 5 + 2 * (settings.flow_start == "reference")

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        """Gradients of the raw reward with respect to the states x and x_next, and the field that h_phi starts from,
        [b, C, H, W] each."""
        return {
            "gradient": self.state_gradient(policy, batch),
            "gradient_next": self.state_gradient(policy, batch, after=True),
            "start": self._start(policy, batch, batch.x, batch.t),
            "start_next": self._start(policy, batch, batch.x_next, batch.t_next),
        }

    @torch.no_grad()
    def _start(self, policy: Policy, batch: Transitions, x: Tensor, t: Tensor) -> Tensor:
        """The frozen model's score -eps / sigma_t [b, C, H, W]: h_phi then need not learn it first."""
        if self.settings.flow_start == "zero":
            return torch.zeros_like(x)
        inner = t.clamp(min=1)
        noise = self.kernel.noise(inner, x.dtype).sqrt().reshape(-1, 1, 1, 1)
        return -self.kernel.epsilon(policy.reference(x, inner, batch.embeddings), inner, x) / noise

    def state_gradient(self, policy: Policy, batch: Transitions, after: bool = False) -> Tensor:
        """J^T clean_gradient at x, or at x_next `after`; J is the Jacobian of the clean prediction."""
        x, t, factor = batch.x, batch.t, batch.clean_gradient
        if after:
            x, t, factor = batch.x_next, batch.t_next, batch.clean_gradient_next
        assert factor is not None
        if not factor.any():  # forward_looking none, or before forward_looking_from
            return torch.zeros_like(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            guidance = policy.guidance if self.settings.clean_prediction == "guided" else 1.0
            inputs = x, t.clamp(min=1), batch.embeddings, guidance
            # Of the weights behind the rollout's clean prediction; under a lag with `snapshot`, of later ones.
            reference, model = self.settings.forward_looking == "base", policy.model
            output = model.predict_reference(*inputs) if reference else model.predict(*inputs)[0]
            clean = torch.where((t == 0).reshape(-1, 1, 1, 1), x, self.kernel.clean(output, inputs[1], x))
            return torch.autograd.grad(clean, x, factor.to(clean.dtype))[0]

    def loss(self, batch: Transitions, output: Tensor, flow: Flow, beta: float, flow_gradient: bool) -> Loss:
        """Of both conditions. Without a flow network h_phi = 0, and the forward condition alone is left."""
        transition, settings = (batch.t, batch.x, batch.x_next), self.settings
        h = h_next = torch.zeros_like(batch.x)
        if flow is not None:
            h, h_next = both_ends(flow, batch, flow_gradient)
        if "start" in batch.prepared:
            h, h_next = h + batch.prepared["start"], h_next + batch.prepared["start_next"]
        ahead = h_next.detach() if settings.detach_next_flow else h_next
        ahead = torch.where(batch.terminal.reshape(-1, 1, 1, 1), torch.zeros_like(h_next), ahead)
        fade_next = self.gamma(batch.t_next, h.dtype)
        if not settings.decay_terminal:
            fade_next = torch.where(batch.terminal, torch.ones_like(fade_next), fade_next)
        g_next = ahead + beta * fade_next.reshape(-1, 1, 1, 1) * batch.prepared["gradient_next"]

        weights, score = self.weights(batch), self.kernel.score_pf(output, *transition)
        loss = (weights * mean_square(score - self.known_score_next(batch) - g_next)).mean()
        parts = {"forward_loss": loss}
        if flow is None:
            return loss, parts
        g = h + beta * self.gamma(batch.t, h.dtype).reshape(-1, 1, 1, 1) * batch.prepared["gradient"]
        log_pf = self.kernel.log_pf(output, *transition, "sum")
        score = torch.autograd.grad(log_pf.sum(), batch.x, retain_graph=True)[0].detach()  # through the U-Net
        each = weights * mean_square(score - self.known_score(batch) + g)
        if settings.reverse_transitions == "inner":
            each = torch.where(batch.terminal, torch.zeros_like(each), each)
        parts["reverse_loss"] = each.mean()
        loss = loss + settings.reverse_weight * parts["reverse_loss"]
        if self.terminal_loss:
            parts["terminal_loss"] = (batch.terminal * mean_square(h_next)).mean()
            loss = loss + parts["terminal_loss"]
        return loss, parts

    def known_score(self, batch: Transitions) -> Tensor:
        """What the policy's score with respect to x [b, C, H, W] is compared with: log p_B's."""
        return self.kernel.score_pb(batch.t, batch.x, batch.x_next)

    def known_score_next(self, batch: Transitions) -> Tensor:
        """The same with respect to x_next."""
        return self.kernel.score_pb_next(batch.t, batch.x, batch.x_next)
