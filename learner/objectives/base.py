"""What all objectives share: the batch they see, the policy they see it through, and what the learner asks of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffusion.base_model import BaseModel
from diffusion.kernels import DDIMKernel
from learner.objectives.needs import Decay, Needs, Weighting

if TYPE_CHECKING:
    from learner.config.sections import Objective as Settings


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

        return cls(**{item.name: join([getattr(part, item.name) for part in parts]) for item in fields(cls)})


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
        guidance = self.guidance if guided else 1.0
        given = (x, t.clamp(min=1), embeddings, guidance)
        output = self.model.predict_reference(*given) if reference else self.model.predict(*given)[0]
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
        self.given, self.kernel = settings, kernel

    @property
    def group(self) -> int:
        """Transitions whose losses depend on each other: a micro-batch holds whole groups."""
        return 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of it: numbers, strings, lists and dicts."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` once returned."""

    @staticmethod
    def target(given: Settings, dimensions: int) -> str:
        """What it samples from when its loss is zero, in words, for latents of D = `dimensions`."""
        raise NotImplementedError

    @staticmethod
    def extra_passes(given: Settings) -> int:
        """U-Net passes a transition, forward or back to its input, beside the policy's own forward and backward."""
        return 0

    def begin_epoch(self, population: Population) -> None:
        """Hear of all rewards of the epoch, before `prepare`."""

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        """Values [b, ...] of the batch, found once an epoch before its first update; they come back in `prepared`."""
        return {}

    def raw_advantage(self, batch: Transitions, output: Tensor, flow: nn.Module | None, beta: float) -> Tensor:
        """Objectives with groups: [b] what `advantages` compares."""
        raise NotImplementedError

    def advantages(self, raw: Tensor) -> Tensor:
        """Objectives with groups: [b] of consecutive whole groups."""
        raise NotImplementedError

    def loss(
        self, batch: Transitions, output: Tensor, flow: nn.Module | None, beta: float, flow_gradient: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the batch's transitions, and its parts by name for the log.

        Args:
            output: the policy's guided output at batch.x, with gradient (to batch.x too, if reward_gradients).
            flow: the flow network, or None if `flow` is None.
            beta: this epoch's.
            flow_gradient: False where the flow is held fixed in a policy step.
        """
        raise NotImplementedError

    def flow_loss(self, batch: Transitions, flow: nn.Module, beta: float) -> Tensor:
        """Loss of a flow-only fit, mean over the batch; only if fits_flow."""
        raise NotImplementedError

    def log_pf_old(self, batch: Transitions) -> Tensor:
        """log p_F [b] of the rollout's weights, summed or averaged over dimensions as the config says."""
        log_pf = batch.prepared.get("log_pf_old", batch.log_pf_old)
        return log_pf if self.given.log_prob_reduction == "sum" else log_pf / batch.x[0].numel()

    def recomputed_log_pf(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        """For `prepare`: the learner's own log p_F of the rollout's weights, if objective.old_log_prob says so. In low
        precision the sampler's differs by more than a clip range, if only by the shape of the batch."""
        if self.given.old_log_prob == "sampler":
            return {}
        with torch.no_grad():
            output = policy.output(batch)
            return {"log_pf_old": self.kernel.log_pf(output, batch.t, batch.x, batch.x_next, "sum")}

    def weights(self, batch: Transitions) -> Tensor:
        """Weight [b] of each transition by objective.transition_weight."""
        kernel, dtype = self.kernel, batch.x.dtype
        grid = kernel.variance(kernel.timesteps, dtype)
        return transition_weights(kernel.variance(batch.t, dtype), grid, self.given.transition_weight)


def both_ends(flow: nn.Module, batch: Transitions) -> tuple[Tensor, Tensor]:
    """The flow network at x and at x_next, in one call."""
    both = flow(
        torch.cat([batch.x.detach(), batch.x_next]),
        torch.cat([batch.t, batch.t_next]),
        torch.cat([batch.embeddings, batch.embeddings]),
    )
    here, after = both.chunk(2)
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
    if kind == "uniform":
        return torch.ones_like(variance)
    return variance / grid_variance.mean()


def anneal(beta: float, epoch: int, epochs: int, fraction: float) -> float:
    """beta_e: rises linearly from 0 at epoch 0 to beta after `fraction` of the epochs, then stays."""
    ramp = fraction * epochs
    return beta if ramp <= 0 else beta * min(1.0, epoch / ramp)
