"""DAG-DB: detailed balance for diffusion models (arXiv 2406.00633, Eq. 8).

A transition x_t -> x_t' is in balance when  F(x_t) p_F(x_t'|x_t) = F(x_t') p_B(x_t|x_t').  In log space, with the
forward-looking state flow  log F(x_t) = f_phi(x_t) + psi(x_t)  and  log F(x_0) = beta r(x_0),  the residual is

    delta = log F(x_t) + log p_F(x_t'|x_t) - log p_B(x_t|x_t') - log F(x_t')

psi may be any function of the state, as long as one stored value serves both ends. All values are in nats; with `mean`
log-probabilities they are nats per dimension, and the target is exp(D beta r). With `sum` log F(x_t) also has what is
known of it without a network (`known`): hundreds to thousands of nats."""

import torch
from torch import Tensor, nn

from diffusion.kernels import GaussianKernel
from learner.objectives.base import Flow, Loss, Objective, Transitions, both_ends
from learner.objectives.needs import NEEDS


def next_log_flow(f_next: Tensor, psi_next: Tensor, log_reward: Tensor, terminal: Tensor, detach: bool) -> Tensor:
    """log F(x_t') [b]: log_reward = beta r(x_0) where `terminal`, else f_phi(x_t') + psi(x_t'). `detach` stops the
    gradient into f_phi(x_t'): otherwise it absorbs part of the mismatch of fixed-variance steps."""
    ahead = (f_next.detach() if detach else f_next) + psi_next
    return torch.where(terminal, log_reward, ahead)


class DagDB(Objective):
    """The mean over transitions of the squared (or Huber) residual trains policy and flow."""

    needs = NEEDS["dag_db"]
    target = (
        "target proportional to exp({exponent} x reward) (beta {beta:g}, log-probabilities by {log_prob_reduction} "
        "over D = {dimensions})"
    )

    def loss(self, batch: Transitions, output: Tensor, flow: Flow, beta: float, flow_gradient: bool) -> Loss:
        delta = self.residual(batch, self.log_pf(batch, output), flow, beta, flow_gradient)
        balance = (self.weights(batch) * self.penalty(delta)).mean()
        return balance, {"balance": balance, "residual_squared": delta.square().mean()}

    def flow_loss(self, batch: Transitions, flow: nn.Module, beta: float) -> Tensor:
        """Not weighted by sigma_t^2: that holds down the 1/sigma_t^2 of the policy's gradient, which f's has not."""
        return self.penalty(self.residual(batch, self.log_pf_old(batch), flow, beta, flow_gradient=True)).mean()

    def numbers(self, batch: Transitions, output: Tensor, flow: Flow, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """With the whole residual as what the log-ratio lacks: for least squares in the policy, whose flow is fixed."""
        log_pf = self.log_pf(batch, output)
        with torch.no_grad():
            rest = self.residual(batch, log_pf.detach(), flow, beta, False) - log_pf.detach()
        return log_pf, rest, torch.zeros_like(rest)

    def residuals(self, ratio: Tensor, log_flow: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        return ratio + log_flow - goal[:, None], torch.ones(1, dtype=ratio.dtype, device=ratio.device)

    def residual(self, batch: Transitions, log_pf: Tensor, flow: Flow, beta: float, flow_gradient: bool) -> Tensor:
        """delta [b], in nats (per dimension if log-probabilities are means), rewards multiplied by beta."""
        settings = self.settings
        f, f_next = both_ends(flow, batch, flow_gradient)
        if settings.log_prob_reduction == "sum":
            f, f_next = f + self.known(batch.x, batch.t), f_next + self.known(batch.x_next, batch.t_next)
        psi = self.psi(batch.t, batch.reward, beta)
        psi_next = self.psi(batch.t_next, batch.reward_next, beta)
        log_reward = beta * batch.reward_terminal
        log_flow_next = next_log_flow(f_next, psi_next, log_reward, batch.terminal, settings.detach_next_flow)
        return f + psi + log_pf - self.log_other(batch) - log_flow_next

    def log_other(self, batch: Transitions) -> Tensor:
        """What log p_F [b] is in balance with: log p_B."""
        return self.kernel.log_pb(batch.t, batch.x, batch.x_next, self.settings.log_prob_reduction)

    def known(self, x: Tensor, t: Tensor) -> Tensor:
        """What log F(x_t) [b] has under `sum` without a network."""
        return known_log_flow(self.kernel, self.settings.span(self.kernel.num_steps)[1], x, t)


def known_log_flow(kernel: GaussianKernel, end: int, x: Tensor, t: Tensor) -> Tensor:
    """What log F(x_t) [b] has whatever the images are, where the `end`-th state is the end: log N(x; 0, I) where all is
    noise, fading as |x|^2 becomes the image's, and the volume that every step of p_B adds, -D/2 log(sigma_t^2 /
    sigma_end^2). A network that normalises its channels cannot learn the first, nor soon the second. Under `mean` it
    would be 1/D of it, too little beside beta r to matter."""
    size, last = x[0].numel(), torch.tensor([*kernel.timesteps.tolist(), 0][end])
    left = kernel.noise(last, torch.float64).item()  # on the CPU: no host waits for it
    noise = kernel.noise(t, torch.float64)
    norm = x.double().square().flatten(1).sum(1)
    return -(noise.square() * (norm - size) + size * (noise / left).log()).to(x.dtype) / 2
