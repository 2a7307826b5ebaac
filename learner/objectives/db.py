"""DAG-DB: detailed balance for diffusion models (arXiv 2406.00633, Eq. 8).

A transition x_t -> x_t' is in balance when  F(x_t) p_F(x_t'|x_t) = F(x_t') p_B(x_t|x_t').  In log space, with the
forward-looking state flow  log F(x_t) = f_phi(x_t) + psi(x_t)  and  log F(x_0) = beta r(x_0),  the residual is

    delta = log F(x_t) + log p_F(x_t'|x_t) - log p_B(x_t|x_t') - log F(x_t')

psi may be any function of the state, as long as one stored value serves both ends (it does: rewards are scored
once a state). All values are in nats; with `mean` log-probabilities they are nats per dimension, and the target
is exp(D beta r).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Penalty = Literal["squared", "huber"]
Weighting = Literal["uniform", "variance"]
Decay = Literal["none", "sqrt_abar", "abar"]


def gamma(abar: Tensor, decay: Decay) -> Tensor:
    """Weight gamma_t [B] of the forward-looking reward: 1, or the shrinking of arXiv 2412.07775 (sqrt(abar_t) or
    abar_t). A clean prediction from pure noise says little about the image; at t = 0 gamma is 1 by definition."""
    if decay == "none":
        return torch.ones_like(abar)
    return abar.sqrt() if decay == "sqrt_abar" else abar


def log_flow(f: Tensor, psi: Tensor) -> Tensor:
    """Forward-looking log F(x_t) [B] of a state that is not terminal."""
    return f + psi


def next_log_flow(f_next: Tensor, psi_next: Tensor, log_reward: Tensor, terminal: Tensor, detach: bool) -> Tensor:
    """log F(x_t') [B]: log_reward = beta r(x_0) where `terminal`, else f_phi(x_t') + psi(x_t').

    `detach` stops the gradient into f_phi(x_t') (semi-gradient, the corrected setting): the published residual
    gradient lets f(x_t') absorb part of the mismatch of fixed-variance steps.
    """
    ahead = (f_next.detach() if detach else f_next) + psi_next
    return torch.where(terminal, log_reward, ahead)


def residual(log_flow: Tensor, log_pf: Tensor, log_pb: Tensor, log_flow_next: Tensor) -> Tensor:
    """Detailed-balance residual delta [B]."""
    return log_flow + log_pf - log_pb - log_flow_next


def penalty(delta: Tensor, kind: Penalty, huber_width: float = 1.0) -> Tensor:
    """Per-transition loss [B]: delta^2, or Huber (quadratic within huber_width, then linear, same curvature)."""
    if kind == "squared":
        return delta.square()
    return 2 * torch.nn.functional.huber_loss(delta, torch.zeros_like(delta), reduction="none", delta=huber_width)


def transition_weights(variance: Tensor, grid_variance: Tensor, kind: Weighting) -> Tensor:
    """Weight of each transition [B]: 1, or sigma_t^2 over its mean on the grid.

    The last transition's sigma is tiny and its gradient, 1/sigma^2, drowns the others; variance weights undo that.
    """
    if kind == "uniform":
        return torch.ones_like(variance)
    return variance / grid_variance.mean()


def anneal(beta: float, epoch: int, epochs: int, fraction: float) -> float:
    """beta_e: rises linearly from 0 at epoch 0 to beta after `fraction` of the epochs, then stays."""
    ramp = fraction * epochs
    return beta if ramp <= 0 else beta * min(1.0, epoch / ramp)
