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

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from learner.objectives.base import Objective, Policy, Transitions, both_ends, gamma
from learner.objectives.needs import NEEDS

if TYPE_CHECKING:
    from learner.config.sections import Objective as Settings


def forward_residual(score_pf: Tensor, score_pb: Tensor, g_next: Tensor) -> Tensor:
    """score_pf - score_pb - g_next [B, C, H, W], all with respect to x_t'; 0 where the forward condition holds."""
    return score_pf - score_pb - g_next


def reverse_residual(score_pf: Tensor, score_pb: Tensor, g: Tensor) -> Tensor:
    """score_pf - score_pb + g [B, C, H, W], all with respect to x_t; 0 where the reverse condition holds."""
    return score_pf - score_pb + g


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

    @staticmethod
    def target(given: Settings, dimensions: int) -> str:
        return f"target proportional to exp({given.beta:g} x reward), whatever the base model's own density"

    @staticmethod
    def extra_passes(given: Settings) -> int:
        # Forward and back at both ends, once more back for the score with respect to x, and forward again for scores.
        return 5 + 2 * (given.flow_start == "reference")

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        """Gradients of the raw reward with respect to the states x and x_next, and the field that h_phi starts from,
        [b, C, H, W] each."""
        found = {}
        for x, t, clean_gradient, end in (
            (batch.x, batch.t, batch.clean_gradient, ""),
            (batch.x_next, batch.t_next, batch.clean_gradient_next, "_next"),
        ):
            found[f"gradient{end}"] = self.state_gradient(policy, batch, x, t, clean_gradient)
            found[f"start{end}"] = self._start(policy, batch, x, t)
        return found

    @torch.no_grad()
    def _start(self, policy: Policy, batch: Transitions, x: Tensor, t: Tensor) -> Tensor:
        """The frozen model's score -eps / sqrt(1 - abar_t) [b, C, H, W]: without it h_phi would first have to learn
        what the base model knows, and the forward loss would unlearn the policy meanwhile."""
        if self.given.flow_start == "zero":
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
        given = self.given
        if not clean_gradient.any():  # forward_looking none, or before forward_looking_from
            return torch.zeros_like(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            # The weights that the rollout took its clean prediction from.
            reference, guided = given.forward_looking == "base", given.clean_prediction == "guided"
            clean = policy.clean(x, t, batch.embeddings, reference, guided)
            return torch.autograd.grad(clean, x, clean_gradient.to(clean.dtype))[0]

    def loss(
        self, batch: Transitions, output: Tensor, flow: nn.Module | None, beta: float, flow_gradient: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        h, h_next = self.flow_ends(batch, flow, flow_gradient)
        h, h_next = h + batch.prepared["start"], h_next + batch.prepared["start_next"]
        g, g_next = self.values(batch, h, h_next, beta)
        kernel, x, x_next = self.kernel, batch.x, batch.x_next
        forward = forward_residual(
            kernel.score_pf(output, batch.t, x, x_next), kernel.score_pb_next(batch.t, x, x_next), g_next
        )
        reverse = reverse_residual(self.score_of_state(batch, output), kernel.score_pb(batch.t, x, x_next), g)
        return self.combine(batch, forward, reverse, None)

    def flow_ends(self, batch: Transitions, flow: nn.Module | None, flow_gradient: bool) -> tuple[Tensor, Tensor]:
        """h_phi at x and at x_next."""
        assert flow is not None
        with contextlib.nullcontext() if flow_gradient else torch.no_grad():
            return both_ends(flow, batch)

    def values(self, batch: Transitions, h: Tensor, h_next: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """g at x and at x_next [b, C, H, W], the latter beta grad r where that is the terminal state."""
        given = self.given
        terminal = _wide(batch.terminal, h)
        fade, fade_next = (
            gamma(self.kernel.abar(t, h.dtype), given.forward_looking_decay) for t in (batch.t, batch.t_next)
        )
        if not given.decay_terminal:
            fade_next = torch.where(batch.terminal, torch.ones_like(fade_next), fade_next)
        ahead = torch.where(terminal, torch.zeros_like(h_next), h_next.detach() if given.detach_next_flow else h_next)
        g = h + beta * _wide(fade, h) * batch.prepared["gradient"]
        return g, ahead + beta * _wide(fade_next, h) * batch.prepared["gradient_next"]

    def score_of_state(self, batch: Transitions, output: Tensor) -> Tensor:
        """grad_{x_t} log p_F(x_t'|x_t) [b, C, H, W] of the current policy, through its U-Net; a constant."""
        log_pf = self.kernel.log_pf(output, batch.t, batch.x, batch.x_next, "sum")
        return torch.autograd.grad(log_pf.sum(), batch.x, retain_graph=True)[0].detach()

    def combine(
        self, batch: Transitions, forward: Tensor, reverse: Tensor | None, h_end: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss: the mean over transitions of squared residuals, with weights; `h_end` is pulled to 0 where x_next is
        the terminal state."""
        given, weights = self.given, self.weights(batch)
        forward_loss = (weights * mean_square(forward)).mean()
        loss, parts = forward_loss, {"forward_loss": forward_loss}
        if reverse is not None:
            each = weights * mean_square(reverse)
            if given.reverse_transitions == "inner":
                each = torch.where(batch.terminal, torch.zeros_like(each), each)
            parts["reverse_loss"] = each.mean()
            loss = loss + given.reverse_weight * parts["reverse_loss"]
        if h_end is not None:
            parts["terminal_loss"] = (batch.terminal * mean_square(h_end)).mean()
            loss = loss + parts["terminal_loss"]
        return loss, parts
