"""What all objectives share: the batch they see, the policy they see it through, and what the learner asks of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.base_model import BaseModel
from diffusion.kernels import GaussianKernel
from diffusion.trajectory import Trajectories
from learner.config.sections import Objective as Settings
from learner.objectives.needs import Needs

ADVANTAGE_LIMIT = 5.0  # of policy gradients
Flow = nn.Module | None  # the network that the objective trains beside the policy, as needs.flow says
Loss = tuple[Tensor, dict[str, Tensor]]  # mean over the batch's transitions, and its parts by name for the log


@dataclass
class Transitions:
    """A batch of b transitions, tensors on the learner's device. Rewards are raw."""

    x: Tensor  # [b, C, H, W]
    x_next: Tensor  # [b, C, H, W]
    t: Tensor  # [b] int64
    t_next: Tensor  # [b] int64
    trajectory_id: Tensor  # [b] int64
    embeddings: Tensor  # [b, L, E]
    reward: Tensor  # [b] of the clean prediction at x
    reward_next: Tensor  # [b] of the clean prediction at x_next
    reward_terminal: Tensor  # [b] of the terminal state
    terminal: Tensor  # [b] bool: x_next is the state whose flow is the reward
    log_pf_old: Tensor  # [b] nats, summed over dimensions, of the rollout
    output_old: Tensor  # [b, C, H, W] guided output of the rollout; [b, 0, H, W] in flow-only fits, which need none
    log_ref: Tensor | None = None  # [b] nats, summed over dimensions: of the frozen reference
    clean_gradient: Tensor | None = None  # [b, C, H, W] of the raw reward to the clean prediction at x
    clean_gradient_next: Tensor | None = None  # [b, C, H, W] the same at x_next
    prepared: dict[str, Tensor] = field(default_factory=dict)  # [b, ...] what the objective computed once an epoch


@dataclass(frozen=True)
class Policy:
    """The base model with its adapter as a policy, and without it as the frozen reference, both with guidance."""

    model: BaseModel
    guidance: float

    def output(self, batch: Transitions) -> Tensor:
        """Guided model output [b, C, H, W] at batch.x, with gradient to the adapter."""
        return self.model.predict(batch.x, batch.t, batch.embeddings, self.guidance)[0]

    def reference(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        """The same of the reference, with gradient to x."""
        return self.model.predict_reference(x, t, embeddings, self.guidance)


class Objective:
    """A loss over transitions. A new one is a subclass in a file here, an entry in needs.py and one in by_name.py."""

    needs: ClassVar[Needs]
    target: ClassVar[str]  # what it samples from when its loss is zero: a template for by_name.py's `target`

    def __init__(self, settings: Settings, kernel: GaussianKernel) -> None:
        self.settings, self.kernel = settings, kernel
        self.memory: dict[str, Any] = {}  # what a checkpoint must keep: numbers, strings, lists and dicts

    @property
    def group(self) -> int:
        """Transitions whose losses depend on each other: a window holds whole groups."""
        if self.needs.whole_trajectories:
            first, end = self.settings.span(self.kernel.num_steps)
            return end - first
        return self.settings.group_size if self.needs.compares_groups else 1

    @classmethod
    def extra_passes(cls, settings: Settings) -> int:
        """U-Net passes a transition, forward or back to its input, beside the policy's own forward and backward."""
        return int(cls.needs.uses_ratio and settings.old_log_prob == "learner")

    def nats(self, trajectories: Trajectories) -> np.ndarray:
        """What `begin_epoch` gets of each transition of whole trajectories, [B, K] as log_prob_reduction says; else
        nothing, [B, 0]."""
        return np.zeros((len(trajectories.selected), 0), np.float32)

    def begin_epoch(
        self, ids: Sequence[int], prompts: Sequence[str], rewards: Sequence[float], nats: np.ndarray, beta: float
    ) -> None:
        """All n trajectories of the epoch, on all ranks, in the order of their ids; their images' raw rewards less
        objective.reward_offset, or, with reward.options.normalise, sums of standardised parts; and `nats` [n, K]."""

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        """Values [b, ...] of the batch, computed once an epoch, before its first update, and then in `prepared`: here
        the learner's own log p_F of the rollout's weights, from which the sampler's differs in low precision."""
        if not (self.needs.uses_ratio and self.settings.old_log_prob == "learner"):
            return {}
        with torch.no_grad():
            output = policy.output(batch)
            return {"log_pf_old": self.kernel.log_pf(output, batch.t, batch.x, batch.x_next, "sum")}

    def carry_back(
        self, policy: Policy, states: Tensor, times: list[int], noisy: int, embeddings: Tensor, gradient: Tensor
    ) -> dict[str, Tensor]:
        """Values [b, K, ...] by trained transition of whole trajectories; only if needs.adjoint."""
        raise NotImplementedError

    def prepare_window(self, policy: Policy, batches: Sequence[Transitions], flow: Flow, beta: float) -> None:
        """Add to `prepared` of micro-batches that together hold whole groups, just before they are trained on."""

    def loss(self, batch: Transitions, output: Tensor, flow: Flow, beta: float, flow_gradient: bool) -> Loss:
        """Of the policy's guided `output` at batch.x, with gradient (to batch.x too, if reward_gradients). Without
        `flow_gradient` the flow is held fixed."""
        raise NotImplementedError

    def flow_loss(self, batch: Transitions, flow: nn.Module, beta: float) -> Tensor:
        """Loss of a flow-only fit, mean over the batch; only if needs.flow is log_flow."""
        raise NotImplementedError

    def numbers(self, batch: Transitions, output: Tensor, flow: Flow, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """What `residuals` are made of, [b] nats each: log-ratio log p_F - log q, with gradient to `output`, log-flow
        at x, and goal. Only if needs.least_squares."""
        raise NotImplementedError

    def residuals(self, ratio: Tensor, log_flow: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """[n, M] nats of n groups, linear in all arguments and 0 at the target, and each one's weight [M], from
        log-ratios and log-flows [n, K] and goals [n]; K is `group`."""
        raise NotImplementedError

    def log_pf(self, batch: Transitions, output: Tensor) -> Tensor:
        """log p_F [b] of the weights that gave `output`, summed or averaged over dimensions as the config says."""
        return self.kernel.log_pf(output, batch.t, batch.x, batch.x_next, self.settings.log_prob_reduction)

    def log_pf_old(self, batch: Transitions) -> Tensor:
        """The same of the rollout's weights."""
        log_pf = batch.prepared.get("log_pf_old", batch.log_pf_old)
        return log_pf if self.settings.log_prob_reduction == "sum" else log_pf / batch.x[0].numel()

    def policy_loss(self, batch: Transitions, log_pf: Tensor, advantage: Tensor) -> Loss:
        """Weighted mean of the clipped loss for `advantage` [b]; `clipped` is the share of ratios outside the clip."""
        each, outside = clipped(log_pf - self.log_pf_old(batch), advantage, self.settings.clip_range)
        loss = (self.weights(batch) * each).mean()
        return loss, {"policy_loss": loss, "clipped": outside.float().mean()}

    def matching_loss(self, batch: Transitions, output: Tensor, wanted: Tensor, weights: Tensor) -> Loss:
        """Of the policy's means against the reference's moved by `wanted` [b, C, H, W], over 2 sigma^2, summed over
        dimensions: nats, mean over transitions by `weights` [b]. `matched` is what the untrained policy's loss is above
        it; the target's own need not be 0, as what single trajectories want is noise. Uses `reference_output`."""
        where, variance = (batch.t, batch.x), self.kernel.variance(batch.t, batch.x.dtype).reshape(-1, 1, 1, 1)
        moved = self.kernel.mean(output, *where) - self.kernel.mean(batch.prepared["reference_output"], *where)
        each, none = (((by - wanted).square() / (2 * variance)).flatten(1).sum(1) for by in (moved, 0 * moved))
        loss = (weights * each).mean()
        return loss, {"matching_loss": loss, "matched": (weights * (none - each)).mean()}

    def penalty(self, delta: Tensor) -> Tensor:
        """Of residuals, in their shape: delta^2, or Huber (quadratic within huber_width, then linear, same
        curvature)."""
        if self.settings.penalty == "squared":
            return delta.square()
        width, zero = self.settings.huber_width, torch.zeros_like(delta)
        return 2 * nn.functional.huber_loss(delta, zero, reduction="none", delta=width)

    def psi(self, t: Tensor, reward: Tensor, beta: float) -> Tensor:
        """Forward-looking part of the log-flow [b] of states at t whose clean predictions have this reward."""
        scale = beta if self.settings.forward_looking != "none" else 0.0
        return scale * self.gamma(t, reward.dtype) * reward

    def weights(self, batch: Transitions) -> Tensor:
        """[b]: 1, or sigma_t^2 over its mean on the grid, as objective.transition_weight says."""
        variance = self.kernel.variance(batch.t, batch.x.dtype)
        if self.settings.transition_weight == "uniform":
            return torch.ones_like(variance)
        return variance / self.kernel.variance(self.kernel.timesteps, batch.x.dtype).mean()

    def gamma(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Weight gamma_t [b] of the forward-looking reward: a clean prediction from noise says little of the image."""
        abar, decay = self.kernel.abar(t, dtype), self.settings.forward_looking_decay
        if decay == "none":
            return torch.ones_like(abar)
        return abar.sqrt() if decay == "sqrt_abar" else abar


def both_ends(flow: Flow, batch: Transitions, gradient: bool) -> tuple[Tensor, Tensor]:
    """The flow network at x and at x_next, in one call; without `gradient` as constants."""
    assert flow is not None
    x, t = torch.cat([batch.x.detach(), batch.x_next]), torch.cat([batch.t, batch.t_next])
    with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
        return flow(x, t, torch.cat([batch.embeddings, batch.embeddings])).chunk(2)


def clipped(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Clipped policy-gradient loss [b] (its gradient is zero where the clip binds), and whether the ratio
    exp(log_ratio) is outside of 1 +- clip_range [b] bool. `advantage` must carry no gradient."""
    ratio = log_ratio.clamp(max=20.0).exp()  # nats, beyond any clip; exp would overflow to a gradient of 0 x inf
    bounded = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * bounded), (ratio.detach() - 1).abs() > clip_range


def anneal(beta: float, epoch: int, epochs: int, fraction: float) -> float:
    """beta_e: rises linearly from 0 at epoch 0 to beta after `fraction` of the epochs, then stays."""
    ramp = fraction * epochs
    return beta if ramp <= 0 else beta * min(1.0, epoch / ramp)
