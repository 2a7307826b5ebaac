"""nabla-DB: the gradients of detailed balance (arXiv 2412.07775).

Differentiating the balance of a transition x_t -> x_t' (see db.py) with respect to either end gives two conditions on
g(x_t) = grad_{x_t} log F(x_t):

    forward  (by x_t'):  grad log p_F(x_t'|x_t) = grad log p_B(x_t|x_t') + g(x_t')
    reverse  (by x_t):   grad log p_F(x_t'|x_t) = grad log p_B(x_t|x_t') - g(x_t)

with g(x_0) = beta grad r(x_0) at the end. Forward-looking, g(x_t) = h_phi(x_t) + beta gamma_t grad_{x_t} r(xhat(x_t)):
any fixed vector field may be added to h_phi, as long as both conditions see the same. All log-probabilities are summed
over dimensions, so beta is the true exponent: the target is exp(beta r). Losses are means over dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learner.config.sections import Objective as Settings
from learner.objectives.base import Flow, Loss, Objective, Policy, Transitions, both_ends, gamma
from learner.objectives.needs import NEEDS


def forward_residual(score_pf: Tensor, known: Tensor, g_next: Tensor) -> Tensor:
    """score_pf - known - g_next [B, C, H, W], all with respect to x_t'; 0 where the forward condition holds.
    `known` is the score of p_B, in residual_nabla_db.py that of the reference."""
    return score_pf - known - g_next


def reverse_residual(score_pf: Tensor, known: Tensor, g: Tensor) -> Tensor:
    """score_pf - known + g [B, C, H, W], all with respect to x_t; 0 where the reverse condition holds."""
    return score_pf - known + g


def mean_square(residual: Tensor) -> Tensor:
    """[B]: mean of the squared residual [B, C, H, W] over dimensions (not a sum)."""
    return residual.square().flatten(1).mean(1)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


class NablaDB(Objective):
    """nabla-DB (arXiv 2412.07775): forward and reverse loss, of log-probabilities summed over dimensions. The forward
    loss trains the policy (and, as published, the flow), the reverse loss the flow alone: as in the published code no
    gradient goes through the policy's score with respect to x_t."""

    needs = NEEDS["nabla_db"]
    terminal_loss = False  # whether h_phi(x_0) is pulled to 0

    @staticmethod
    def target(settings: Settings, dimensions: int) -> str:
        return f"target proportional to exp({settings.beta:g} x reward), whatever the base model's own density"

    @classmethod
    def extra_passes(cls, settings: Settings) -> int:
        # Forward and back at both ends, once more back for the score with respect to x, and forward again for scores.
        return 5 + 2 * (settings.flow_start == "reference")

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        """Gradients of the raw reward with respect to the states x and x_next, and the field that h_phi starts from,
        [b, C, H, W] each."""
        return {
            "gradient": self.state_gradient(policy, batch, batch.x, batch.t, batch.clean_gradient),
            "gradient_next": self.state_gradient(policy, batch, batch.x_next, batch.t_next, batch.clean_gradient_next),
            "start": self._start(policy, batch, batch.x, batch.t),
            "start_next": self._start(policy, batch, batch.x_next, batch.t_next),
        }

    @torch.no_grad()
    def _start(self, policy: Policy, batch: Transitions, x: Tensor, t: Tensor) -> Tensor:
        """The frozen model's score -eps / sqrt(1 - abar_t) [b, C, H, W]: without it h_phi would first have to learn
        what the base model knows, and the forward loss would unlearn the policy meanwhile."""
        if self.settings.flow_start == "zero":
            return torch.zeros_like(x)
        inner = t.clamp(min=1)
        output = policy.model.predict_reference(x, inner, batch.embeddings, policy.guidance)
        noise = _wide((1 - self.kernel.abar(inner, x.dtype)).sqrt(), x)
        return -self.kernel.epsilon(output, inner, x) / noise

    def state_gradient(
        self, policy: Policy, batch: Transitions, x: Tensor, t: Tensor, clean_gradient: Tensor | None
    ) -> Tensor:
        """J^T clean_gradient, J the Jacobian of the clean prediction at x: the chain rule's second factor, computed
        where the U-Net is. The first one came from the reward actors."""
        assert clean_gradient is not None
        if not clean_gradient.any():  # forward_looking none, or before forward_looking_from
            return torch.zeros_like(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            # The weights that the rollout took its clean prediction from.
            reference, guided = self.settings.forward_looking == "base", self.settings.clean_prediction == "guided"
            clean = policy.clean(x, t, batch.embeddings, reference, guided)
            return torch.autograd.grad(clean, x, clean_gradient.to(clean.dtype))[0]

    def loss(self, batch: Transitions, output: Tensor, flow: Flow, beta: float, flow_gradient: bool) -> Loss:
        h, h_next = self.flow_ends(batch, flow, flow_gradient)
        g, g_next = self.values(batch, h, h_next, beta)
        known, known_next = self.known_scores(batch)
        forward = forward_residual(self.kernel.score_pf(output, batch.t, batch.x, batch.x_next), known_next, g_next)
        reverse = reverse_residual(self.score_of_state(batch, output), known, g)
        return self.combine(batch, forward, reverse, h_next if self.terminal_loss else None)

    def flow_ends(self, batch: Transitions, flow: Flow, flow_gradient: bool) -> tuple[Tensor, Tensor]:
        """h_phi at x and at x_next, from where it starts."""
        h, h_next = both_ends(flow, batch, flow_gradient)
        start = batch.prepared.get("start")
        return (h, h_next) if start is None else (h + start, h_next + batch.prepared["start_next"])

    def known_scores(self, batch: Transitions) -> tuple[Tensor, Tensor]:
        """What the policy's scores with respect to x and to x_next [b, C, H, W] are compared with: log p_B's."""
        at = batch.t, batch.x, batch.x_next
        return self.kernel.score_pb(*at), self.kernel.score_pb_next(*at)

    def values(self, batch: Transitions, h: Tensor, h_next: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """g at x and at x_next [b, C, H, W], the latter beta grad r where that is the terminal state."""
        settings = self.settings
        fade, fade_next = (
            gamma(self.kernel.abar(t, h.dtype), settings.forward_looking_decay) for t in (batch.t, batch.t_next)
        )
        if not settings.decay_terminal:
            fade_next = torch.where(batch.terminal, torch.ones_like(fade_next), fade_next)
        h_next = h_next.detach() if settings.detach_next_flow else h_next
        ahead = torch.where(_wide(batch.terminal, h), torch.zeros_like(h_next), h_next)
        g = h + beta * _wide(fade, h) * batch.prepared["gradient"]
        return g, ahead + beta * _wide(fade_next, h) * batch.prepared["gradient_next"]

    def score_of_state(self, batch: Transitions, output: Tensor) -> Tensor:
        """grad_{x_t} log p_F(x_t'|x_t) [b, C, H, W] of the current policy, through its U-Net; a constant."""
        log_pf = self.kernel.log_pf(output, batch.t, batch.x, batch.x_next, "sum")
        return torch.autograd.grad(log_pf.sum(), batch.x, retain_graph=True)[0].detach()

    def combine(self, batch: Transitions, forward: Tensor, reverse: Tensor | None, h_end: Tensor | None) -> Loss:
        """Loss: the mean over transitions of squared residuals, with weights; `h_end` is pulled to 0 where x_next is
        the terminal state."""
        weights = self.weights(batch)
        loss = (weights * mean_square(forward)).mean()
        parts = {"forward_loss": loss}
        if reverse is not None:
            each = weights * mean_square(reverse)
            if self.settings.reverse_transitions == "inner":
                each = torch.where(batch.terminal, torch.zeros_like(each), each)
            parts["reverse_loss"] = each.mean()
            loss = loss + self.settings.reverse_weight * parts["reverse_loss"]
        if h_end is not None:
            parts["terminal_loss"] = (batch.terminal * mean_square(h_end)).mean()
            loss = loss + parts["terminal_loss"]
        return loss, parts
