"""DAG-DB reaches a target that is known exactly (T1), through the project's own kernel, loss and update step.

The state is one number, so the law of x_0 under the learned policy is found by pushing N(0, 1) through the
transition densities on a grid: no sampling noise in the metric.
"""

import math

import torch
from torch import Tensor, nn

from diffusion.kernels import DDIMKernel
from learner.config import load_config
from learner.update import Learner, Transitions

STEPS, UPDATES, BATCH = 10, 2000, 64
ABAR = torch.sigmoid(torch.linspace(2, -5, STEPS + 1, dtype=torch.float64))
TARGET_MEAN, TARGET_VARIANCE = ABAR[0].sqrt().item(), 1 - ABAR[0].item()


class AffinePolicy(nn.Module):
    """eps_theta = eps of the base N(0, 1) + a_t x + b_t, zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_slope = nn.Parameter(torch.zeros(STEPS + 1))
        self.lora_offset = nn.Parameter(torch.zeros(STEPS + 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        base = (1 - ABAR[t]).sqrt().float() + self.lora_slope[t]
        return base[:, None, None, None] * x + self.lora_offset[t][:, None, None, None]


class ToyModel:
    """Stands in for BaseModel: one-dimensional states, no prompts, no guidance."""

    device = torch.device("cpu")
    latent_shape = (1, 1, 1)

    def __init__(self) -> None:
        self.unet = AffinePolicy()

    def kernel(self, num_steps: int, eta: float) -> DDIMKernel:
        return DDIMKernel(ABAR, torch.arange(STEPS, 0, -1), "epsilon", eta)

    def predict(self, x, t, embeddings, guidance, unet):
        output = unet(x, t)
        return output, output


class QuadraticFlow(nn.Module):
    """f_phi(x, t) = c_0 + c_1 x + c_2 x^2 with three numbers a step."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(STEPS + 1, 3))

    def forward(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        x = x.flatten()
        return (self.coefficients[t] * torch.stack([torch.ones_like(x), x, x * x], 1)).sum(1)


def log_reward(x: Tensor) -> Tensor:
    return -((x - TARGET_MEAN) ** 2) / (2 * TARGET_VARIANCE) - 0.5 * math.log(2 * math.pi * TARGET_VARIANCE)


def clean_of_base(x: Tensor, t: Tensor) -> Tensor:
    """Clean prediction of the frozen base N(0, 1): E[x_0 | x_t] = sqrt(abar_t) x_t (x itself at t = 0)."""
    return torch.where(t > 0, ABAR[t].sqrt().float() * x, x)


@torch.no_grad()
def rollout(learner: Learner) -> Transitions:
    """BATCH on-policy trajectories, all transitions."""
    x = torch.randn(BATCH, 1, 1, 1)
    states, times = [x], [*learner.kernel.timesteps.tolist(), 0]
    for step in times[:-1]:
        t = torch.full((BATCH,), step)
        x = learner.kernel.sample(learner.unet(x, t), t, x, torch.randn_like(x))
        states.append(x)
    t = torch.tensor(times).repeat_interleave(BATCH)
    every = torch.cat(states)
    reward = log_reward(clean_of_base(every.flatten(), t))
    here, after = slice(0, STEPS * BATCH), slice(BATCH, None)
    return Transitions(
        x=every[here], x_next=every[after], t=t[here], t_next=t[after], embeddings=torch.zeros(STEPS * BATCH, 1, 1),
        reward=reward[here], reward_next=reward[after], reward_terminal=reward[-BATCH:].repeat(STEPS),
        terminal=t[after] == 0, log_pf_old=torch.zeros(STEPS * BATCH), output_old=torch.zeros_like(every[here]),
    )  # fmt: skip


@torch.no_grad()
def density_of_samples(learner: Learner, grid: Tensor) -> Tensor:
    """Density of x_0 on the grid: N(0, 1) pushed through the learned transitions."""
    width = grid[1] - grid[0]
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    n = len(grid)
    for step in learner.kernel.timesteps.tolist():
        t = torch.full((n,), step)
        x = grid.reshape(-1, 1, 1, 1).float()
        mean = learner.kernel.mean(learner.unet(x, t), t, x).flatten().double()
        sigma = learner.kernel.variance(torch.tensor([step])).double().sqrt()
        transition = torch.exp(-((grid[None, :] - mean[:, None]) ** 2) / (2 * sigma**2)) / (
            sigma * math.sqrt(2 * math.pi)
        )
        density = (density[:, None] * transition).sum(0) * width
    return density


def total_variation(learner: Learner) -> float:
    grid = torch.linspace(-7, 7, 401, dtype=torch.float64)
    density = density_of_samples(learner, grid)
    assert abs(density.sum() * (grid[1] - grid[0]) - 1) < 1e-2
    return 0.5 * float((density - log_reward(grid).exp()).abs().sum() * (grid[1] - grid[0]))


def make_learner(*overrides: str) -> Learner:
    config = load_config(
        overrides=[
            "objective.log_prob_reduction=sum", "objective.beta=1", "objective.regulariser=0",
            "objective.penalty=squared", "objective.transition_weight=uniform",
            "objective.forward_looking=base", "objective.last_transition=train", "objective.detach_next_flow=false",
            "learner.learning_rate=3e-2", "flow.learning_rate=3e-2", "flow.fit_steps=0", *overrides,
        ]
    )  # fmt: skip
    return Learner(ToyModel(), QuadraticFlow(), config)  # type: ignore[arg-type]


def train(learner: Learner, updates: int = UPDATES) -> dict[str, float]:
    optimizers = (learner.policy_optimizer, learner.flow_optimizer)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, updates, 0.02 * 3e-2) for o in optimizers]
    metrics: dict[str, float] = {}
    for _ in range(updates):
        metrics = learner.update([rollout(learner)], STEPS * BATCH, beta=1.0)
        for schedule in schedules:
            schedule.step()
    return metrics


def test_t1_dag_db_samples_in_proportion_to_the_reward():
    torch.manual_seed(0)
    learner = make_learner()
    before = total_variation(learner)
    metrics = train(learner)
    after = total_variation(learner)
    print(f"T1: TV {before:.3f} -> {after:.4f}, mean residual^2 {metrics['residual_squared']:.1e}")
    assert before > 0.5
    assert after < 0.02
    assert metrics["residual_squared"] < 1e-3
