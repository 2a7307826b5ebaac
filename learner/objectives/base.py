"""What all objectives share: the batch they see, the policy they see it through, and what the learner asks of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffusion.base_model import BaseModel
from diffusion.kernels import DDIMKernel
from learner.config.sections import Objective as Settings
from learner.objectives.needs import Decay, Needs, Weighting

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
    clean_gradient: Tensor | None = None  # [b, C, H, W] of the raw reward to the clean prediction at x
    clean_gradient_next: Tensor | None = None  # [b, C, H, W] the same at x_next
    prepared: dict[str, Tensor] = field(default_factory=dict)  # [b, ...] what the objective computed once an epoch

    @classmethod
    def concatenate(cls, parts: Sequence[Transitions]) -> Transitions:
        """The transitions of all parts, in order; all of them have the same fields."""

        def join(values: list[Any]) -> Any:
            if isinstance(values[0], dict):
                return {name: torch.cat([value[name] for value in values]) for name in values[0]}
            return None if values[0] is None else torch.cat(values)

        return cls(*(join([getattr(part, column.name) for part in parts]) for column in fields(cls)))


@dataclass(frozen=True)
class Policy:
    """The base model with its adapter as a policy, and without it as the frozen reference, both with guidance."""

    model: BaseModel
    kernel: DDIMKernel
    guidance: float

    def output(self, batch: Transitions) -> Tensor:
        """Guided model output [b, C, H, W] at batch.x, with gradient to the adapter."""
        return self.model.predict(batch.x, batch.t, batch.embeddings, self.guidance)[0]

    def clean(self, x: Tensor, t: Tensor, embeddings: Tensor, reference: bool, guided: bool) -> Tensor:
        """Clean prediction xhat(x_t) [b, C, H, W] of the adapter as it stands, or of the reference; x itself at t=0."""
        inputs = (x, t.clamp(min=1), embeddings, self.guidance if guided else 1.0)
        output = self.model.predict_reference(*inputs) if reference else self.model.predict(*inputs)[0]
        at_end = (t == 0).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(at_end, x, self.kernel.clean(output, t.clamp(min=1), x))


@dataclass(frozen=True)
class Population:
    """Every trajectory of an epoch, on all ranks, in the order of their ids."""

    ids: tuple[int, ...]
    prompts: tuple[str, ...]
    rewards: tuple[float, ...]  # raw, of the images


class Objective:
    """A loss over transitions. A new one is a subclass in a file here, an entry in needs.py and one in by_name.py."""

    needs: ClassVar[Needs]

    def __init__(self, settings: Settings, kernel: DDIMKernel) -> None:
        self.settings, self.kernel = settings, kernel

    @property
    def group(self) -> int:
        """Transitions whose losses depend on each other: a window holds whole groups."""
        return 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of it: numbers, strings, lists and dicts."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` once returned."""

    @staticmethod
    def target(settings: Settings, dimensions: int) -> str:
        """What it samples from when its loss is zero, in words, for latents of D = `dimensions`."""
        raise NotImplementedError

    @classmethod
    def goal(cls, settings: Settings) -> str:
        """The same for readers of a report, whatever D is."""
        return cls.target(settings, 1)

    @classmethod
    def extra_passes(cls, settings: Settings) -> int:
        """U-Net passes a transition, forward or back to its input, beside the policy's own forward and backward."""
        return int(cls.needs.uses_ratio and settings.old_log_prob == "learner")

    def begin_epoch(self, population: Population) -> None:
        """Hear of all rewards of the epoch, before `prepare`."""

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        """Values [b, ...] of the batch, computed once an epoch, before its first update, and then in `prepared`.

        Of objectives with a ratio the learner's own log p_F of the rollout's weights, if objective.old_log_prob says
        so: in low precision the sampler's differs by more than a clip range, if only by the shape of the batch.
        """
        if not (self.needs.uses_ratio and self.settings.old_log_prob == "learner"):
            return {}
        with torch.no_grad():
            output = policy.output(batch)
            return {"log_pf_old": self.kernel.log_pf(output, batch.t, batch.x, batch.x_next, "sum")}

    def prepare_window(self, policy: Policy, batches: Sequence[Transitions], flow: Flow, beta: float) -> None:
        """Add to `prepared` of micro-batches that together hold whole groups, just before they are trained on."""

    def loss(self, batch: Transitions, output: Tensor, flow: Flow, beta: float, flow_gradient: bool) -> Loss:
        """
        Args:
            output: the policy's guided output at batch.x, with gradient (to batch.x too, if reward_gradients).
            beta: this epoch's.
            flow_gradient: False where the flow is held fixed in a policy step.
        """
        raise NotImplementedError

    def flow_loss(self, batch: Transitions, flow: nn.Module, beta: float) -> Tensor:
        """Loss of a flow-only fit, mean over the batch; only if fits_flow."""
        raise NotImplementedError

    def log_pf(self, batch: Transitions, output: Tensor) -> Tensor:
        """log p_F [b] of the weights that gave `output`, summed or averaged over dimensions as the config says."""
        return self.kernel.log_pf(output, batch.t, batch.x, batch.x_next, self.settings.log_prob_reduction)

    def log_pf_old(self, batch: Transitions) -> Tensor:
        """The same of the rollout's weights."""
        log_pf = batch.prepared.get("log_pf_old", batch.log_pf_old)
        return log_pf if self.settings.log_prob_reduction == "sum" else log_pf / batch.x[0].numel()

    def weights(self, batch: Transitions) -> Tensor:
        """Weight [b] of each transition by objective.transition_weight."""
        kernel, dtype = self.kernel, batch.x.dtype
        grid = kernel.variance(kernel.timesteps, dtype)
        return transition_weights(kernel.variance(batch.t, dtype), grid, self.settings.transition_weight)


def both_ends(flow: Flow, batch: Transitions, gradient: bool) -> tuple[Tensor, Tensor]:
    """The flow network at x and at x_next, in one call; without `gradient` as constants."""
    assert flow is not None
    x, t = torch.cat([batch.x.detach(), batch.x_next]), torch.cat([batch.t, batch.t_next])
    with contextlib.nullcontext() if gradient else torch.no_grad():
        here, after = flow(x, t, torch.cat([batch.embeddings, batch.embeddings])).chunk(2)
    return here, after


def gamma(abar: Tensor, decay: Decay) -> Tensor:
    """Weight gamma_t [B] of the forward-looking reward: 1, or the shrinking of arXiv 2412.07775 (sqrt(abar_t) or
    abar_t). A clean prediction from pure noise says little about the image; at t = 0 gamma is 1 by definition."""
    if decay == "none":
        return torch.ones_like(abar)
    return abar.sqrt() if decay == "sqrt_abar" else abar


def transition_weights(variance: Tensor, grid_variance: Tensor, kind: Weighting) -> Tensor:
    """Weight of each transition [B]: 1, or sigma_t^2 over its mean on the grid.

    The last transition's sigma is tiny and its gradient, 1/sigma^2, drowns the others; variance weights undo that.
    """
    return torch.ones_like(variance) if kind == "uniform" else variance / grid_variance.mean()


def anneal(beta: float, epoch: int, epochs: int, fraction: float) -> float:
    """beta_e: rises linearly from 0 at epoch 0 to beta after `fraction` of the epochs, then stays."""
    ramp = fraction * epochs
    return beta if ramp <= 0 else beta * min(1.0, epoch / ramp)
