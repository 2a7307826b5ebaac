"""Problems whose answer is known exactly, for the project's own kernel, objectives and update step. The state is one
number (or a few independent ones), so the law of x_0 under the learned policy is found by pushing N(0, 1) through the
transition densities on a grid: no sampling noise in the metric. Only networks, rollout and rewards are the toy's; see
docs/algorithms.md for the problems (G, realizable, and M, bimodal).
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from diffusion.kernels import DDIMKernel, GaussianKernel
from learner.config import Config
from learner.objectives.base import Transitions
from learner.update import Learner

GRID = torch.linspace(-7, 7, 401, dtype=torch.float64)
WIDTH = float(GRID[1] - GRID[0])
MODES = ((0.5, -1.0, 0.5), (0.5, 1.0, 0.5))  # of M's base: weight, mean, standard deviation
REWARD_MODES = ((0.85, 1.2, 0.45), (0.15, -0.8, 0.45))


@dataclass(frozen=True)
class Problem:
    """`log_reward` of one number; the base is N(0, 1), or M's mixture with `bimodal`. `decoder` makes of x_0 what is
    rewarded, `inner_decoder` of inner states' clean predictions. `steps` is the highest timestep."""

    steps: int
    abar: Tensor
    log_reward: Callable[[Tensor], Tensor]
    bimodal: bool = False
    dimensions: int = 1
    decoder: Callable[[Tensor], Tensor] = lambda clean: clean
    inner_decoder: Callable[[Tensor], Tensor] = lambda clean: clean

    def base_output(self, x: Tensor, t: Tensor) -> Tensor:
        """eps of the base's exact score; of a flow model the velocity."""
        abar = self.abar[t].to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        if not self.bimodal:
            return (1 - abar).sqrt() * x
        logs, scores = [], []
        for weight, mean, deviation in MODES:
            variance = abar * deviation**2 + 1 - abar
            distance = x - abar.sqrt() * mean
            logs.append(math.log(weight) - 0.5 * distance.square() / variance - 0.5 * variance.log())
            scores.append(-distance / variance)
        posterior = torch.softmax(torch.stack(logs), 0)
        return -(1 - abar).sqrt() * (posterior * torch.stack(scores)).sum(0)

    def rewards(self, x: Tensor) -> Tensor:
        return self.log_reward(x).flatten(1).sum(1)


def schedule(steps: int, high: float, low: float) -> Tensor:
    return torch.sigmoid(torch.linspace(high, low, steps + 1, dtype=torch.float64))


def gaussian(steps: int, dimensions: int = 1, end: int = 0) -> Problem:
    """G with R = N(sqrt(abar_0), 1 - abar_0): the exact reverse kernels have the DDIM variance, so zero loss is
    attainable. With `end` it is R of the base's clean prediction at that timestep that has this form."""
    abar = schedule(steps, 2, -5)
    mean, variance = abar[end].sqrt().item(), 1 - abar[end].item()
    if end:  # the clean prediction is sqrt(abar) x
        mean, variance = mean * abar[end].sqrt().item(), variance * abar[end].item()
    scale = 0.5 * math.log(2 * math.pi * variance)
    return Problem(steps, abar, lambda x: -((x - mean) ** 2) / (2 * variance) - scale, dimensions=dimensions)


def tilted(steps: int) -> Problem:
    """G with R = exp(x): the base chain tilted by it is exactly Gaussian with the same variances."""
    return Problem(steps, schedule(steps, 2, -5), lambda x: x)


def settled(steps: int) -> Problem:
    """R = exp(x), and a last transition that hardly moves x_0: its variance is .006 of 1."""
    return Problem(steps, schedule(steps, 5, -5), lambda x: x)


def bimodal() -> Problem:
    """M: not realizable with Gaussian steps of fixed variance."""

    def log_of(x: Tensor, weight: float, mean: float, deviation: float) -> Tensor:
        return math.log(weight) - (x - mean) ** 2 / (2 * deviation**2) - math.log(deviation * math.sqrt(2 * math.pi))

    def log_reward(x: Tensor) -> Tensor:
        return torch.logsumexp(torch.stack([log_of(x, *mode) for mode in REWARD_MODES]), 0)

    return Problem(20, schedule(20, 2, -4), log_reward, bimodal=True)


class Affine(nn.Module):
    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.lora_slope = nn.Parameter(torch.zeros(problem.steps + 1, problem.dimensions))
        self.lora_offset = nn.Parameter(torch.zeros(problem.steps + 1, problem.dimensions))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.lora_slope[t][:, :, None, None] * x + self.lora_offset[t][:, :, None, None]


class Perceptron(nn.Module):
    """Two hidden layers of 64, the step as an embedding; the output layer starts at zero."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        # Named as adapters are: the learner trains what is called so.
        self.lora_step = nn.Embedding(problem.steps + 1, 64)
        self.lora_in, self.lora_hidden, self.lora_out = nn.Linear(1, 64), nn.Linear(64, 64), nn.Linear(64, 1)
        nn.init.zeros_(self.lora_out.weight)
        nn.init.zeros_(self.lora_out.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.lora_in(x.reshape(-1, 1)) + self.lora_step(t))
        return self.lora_out(nn.functional.silu(self.lora_hidden(hidden))).reshape(x.shape)


class Quadratic(nn.Module):
    """Flow f(x, t): a quadratic of each dimension a step, summed."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(problem.steps + 1, 3, problem.dimensions))

    def forward(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        x = x.flatten(1)
        return (self.coefficients[t] * torch.stack([torch.ones_like(x), x, x * x], 1)).sum((1, 2))


class Flow(nn.Module):
    """A policy's network as a flow: its output as a field, or as a scalar."""

    def __init__(self, net: nn.Module, scalar: bool) -> None:
        super().__init__()
        self.net, self.scalar = net, scalar

    def forward(self, x: Tensor, t: Tensor, embeddings: Tensor) -> Tensor:
        return self.net(x, t).flatten() if self.scalar else self.net(x, t)


class ToyModel:
    """Stands in for BaseModel: eps = the base's, plus a network that is zero at the start; without a prompt (for
    guidance), half of the base's."""

    device = torch.device("cpu")

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.unet = Perceptron(problem) if problem.bimodal else Affine(problem)
        self.latent_shape = (problem.dimensions, 1, 1)

    def kernel(self, num_steps: int, eta: float, grid: str, *of_flow_models: object) -> GaussianKernel:
        if make := getattr(self.problem, "kernel", None):  # flow_problem.py
            return make(eta)
        if num_steps == self.problem.steps:
            return DDIMKernel(self.problem.abar, torch.arange(num_steps, 0, -1), "epsilon", eta)
        betas = 1 - self.problem.abar / torch.cat([torch.ones(1), self.problem.abar[:-1]])
        scheduler = DDIMScheduler(
            num_train_timesteps=len(betas), trained_betas=betas.tolist(), timestep_spacing="leading", steps_offset=1,
            set_alpha_to_one=False, clip_sample=False,
        )  # fmt: skip
        return DDIMKernel.from_scheduler(scheduler, num_steps, eta, grid)

    def predict(self, x, t, embeddings=None, guidance=1.0):
        base = self.problem.base_output(x, t)
        output = base + self.unet(x, t)
        return 0.5 * base + guidance * (output - 0.5 * base), output

    def embed(self, prompts):
        return torch.zeros(len(prompts), 1, 1)

    def predict_reference(self, x, t, embeddings=None, guidance=1.0):
        return (0.5 + 0.5 * guidance) * self.problem.base_output(x, t)


def make_learner(problem: Problem, kind: str, rate: float, sampler: dict | None = None, **objective) -> Learner:
    """Log-probabilities summed, beta 1 and no regulariser, unless `objective` says otherwise; every timestep a
    step and no guidance, unless `sampler` does."""
    settings = {
        "kind": kind, "log_prob_reduction": "sum", "beta": 1.0, "regulariser": 0.0, "kl_weight": 1.0,
        "anneal_fraction": 0.0, **objective,
    }  # fmt: skip
    rates = {"learner": {"learning_rate": rate}, "flow": {"learning_rate": rate}}
    sampling = {"steps": problem.steps, "guidance": 1.0, **(sampler or {})}
    config = Config.model_validate({"objective": settings, "sampler": sampling, **rates})
    model, shape, flow = ToyModel(problem), config.needs.flow, None
    if shape == "log_flow" and not problem.bimodal:
        flow = Quadratic(problem)
    elif shape:
        flow = Flow(Perceptron(problem) if problem.bimodal else Affine(problem), shape == "log_flow")
    return Learner(model, flow, config)  # type: ignore[arg-type]


def grid(learner: Learner) -> list[int]:
    """Timesteps from the first to that which counts as the end: where noise ends it is the end."""
    times = [*learner.kernel.timesteps.tolist(), 0]
    settings = learner.config.rollout_settings()
    last = settings.num_steps if settings.terminal is None else settings.terminal
    return times[: min(last, settings.noise_steps, learner.kernel.noisy_steps) + 1]


def base_clean(learner: Learner, x: Tensor) -> Tensor:
    """What is judged of states at the end: themselves, the images that follow without noise, or the base's clean
    prediction."""
    model, kernel, end = learner.model, learner.kernel, grid(learner)[-1]
    if learner.config.sampler.noise == "window" or learner.config.rollout_settings().terminal is None:
        for step in [each for each in kernel.timesteps.tolist() if each <= end]:
            t = torch.full((len(x),), step)
            x = kernel.without_noise(model.predict(x, t)[0], t, x)
        return x
    t = torch.full((len(x),), end)
    return kernel.clean(model.problem.base_output(x, t), t, x) if end else x  # type: ignore[attr-defined]


@torch.no_grad()
def rollout(learner: Learner, count: int) -> Transitions:
    """All transitions of `count` on-policy trajectories, step by step, with rewards and their gradients."""
    model: ToyModel = learner.model  # type: ignore[assignment]
    problem, kernel, sampler = model.problem, learner.kernel, learner.config.sampler
    store = getattr(torch, sampler.state_precision)
    x = torch.randn(count, problem.dimensions, 1, 1).to(store).float()
    states, outputs, times = [x], [], grid(learner)
    for step in times[:-1]:
        t = torch.full((count,), step)
        outputs.append(model.predict(x, t, guidance=sampler.guidance)[0])
        x = kernel.sample(outputs[-1], t, x, torch.randn_like(x)).to(store).float()
        states.append(x)
    t, every, output = torch.tensor(times).repeat_interleave(count), torch.cat(states), torch.cat(outputs)
    transitions = len(times) - 1
    here, after = slice(0, transitions * count), slice(count, None)
    looking = learner.config.objective.forward_looking
    clean = every.clone()  # x_0 is itself
    if looking != "none":
        inner = t[here]
        source = model.problem.base_output(every[here], inner) if looking == "base" else output
        clean[here] = kernel.clean(source, inner, every[here])
    if times[-1]:  # objective.last_transition=skip, or no noise behind the window
        clean[-count:] = base_clean(learner, every[-count:])
    with torch.enable_grad():
        clean.requires_grad_()
        rewards = problem.rewards(torch.cat([problem.inner_decoder(clean[here]), problem.decoder(clean[-count:])]))
        gradients = torch.autograd.grad(rewards.sum(), clean)[0]
    if looking == "none":  # as in a run: nothing is scored but the image
        gradients[here] = 0
    reward, blind = rewards.detach(), slice(0, learner.config.objective.forward_looking_from * count)
    reward[blind], gradients[blind] = 0, 0
    reference = model.predict_reference(every[here], t[here], None, sampler.guidance)
    return Transitions(
        x=every[here], x_next=every[after], t=t[here], t_next=t[after],
        trajectory_id=torch.arange(count).repeat(transitions), embeddings=torch.zeros(transitions * count, 1, 1),
        reward=reward[here], reward_next=reward[after], reward_terminal=reward[-count:].repeat(transitions),
        terminal=t[after] == times[-1], log_pf_old=kernel.log_pf(output, t[here], every[here], every[after], "sum"),
        log_ref=kernel.log_pf(reference, t[here], every[here], every[after], "sum"),
        output_old=output, clean_gradient=gradients[here], clean_gradient_next=gradients[after],
    )  # fmt: skip


def by_trajectory(learner: Learner, count: int) -> Transitions:
    """`rollout` with each trajectory's transitions side by side, those of objective.window."""
    batch = rollout(learner, count)
    first, end = learner.config.objective.span(learner.kernel.num_steps)
    return pick(batch, torch.arange(len(batch.t)).reshape(-1, count)[first:end].T.flatten())


def told(learner: Learner, batch: Transitions) -> Transitions:
    """The batch, told to the objective as an epoch of one prompt."""
    objective, ids = learner.objective, batch.trajectory_id.unique().tolist()
    nats = batch.log_pf_old[:0]
    if objective.needs.whole_trajectories:
        nats = objective.log_pf_old(batch) - objective.log_q(batch)
    rewards = batch.reward_terminal.reshape(len(ids), -1)[:, 0].tolist()
    beta = learner.config.objective.beta
    objective.begin_epoch(ids, ("",) * len(ids), rewards, nats.reshape(len(ids), -1).numpy(), beta)
    return replace(batch, prepared={})


def whole(count: int, every: int = 1, behind: int = 0) -> Refill:
    """Whole trajectories, made every `every` updates, and trained on `behind` such refreshes later."""
    draw = stale(count, every, behind, by_trajectory)
    return lambda learner: told(learner, draw(learner))


def pick(batch: Transitions, index: Tensor) -> Transitions:
    return replace(batch, **{name: value[index] for name, value in vars(batch).items() if isinstance(value, Tensor)})


Refill = Callable[[Learner], Transitions]


def train(learner: Learner, updates: int, rate: float, draw: Refill) -> dict[str, float]:
    """`updates` steps of the learner's own update with cosine rates down to 2 %; the last one's metrics."""
    optimizers = [part for name, part in learner._parts.items() if name.endswith("optimizer")]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, updates, 0.02 * rate) for each in optimizers]
    for _ in range(updates):
        batch = draw(learner)
        batch.prepared |= learner.objective.prepare(learner.policy, batch)
        metrics = learner.update([batch], len(batch.t), beta=learner.config.objective.beta)
        for each in schedules:
            each.step()
    return metrics


def fresh(count: int) -> Refill:
    return lambda learner: rollout(learner, count)


def mixed(count: int) -> Refill:
    """On-policy, in random order: leave-one-out groups mix timesteps."""
    return lambda learner: pick(batch := rollout(learner, count), torch.randperm(len(batch.t)))


def stale(count: int, every: int, behind: int, make: Callable[[Learner, int], Transitions] = rollout) -> Refill:
    """Rollouts made every `every` updates, and trained on `behind` such refreshes later."""

    held, turns = deque(maxlen=behind + 1), itertools.count()

    def draw(learner: Learner) -> Transitions:
        if next(turns) % every == 0:
            held.append(make(learner, count))
        return replace(held[0], prepared={})

    return draw


@torch.no_grad()
def push(learner: Learner, reference: bool = False, dimension: int = 0) -> Tensor:
    """Density of the end on GRID: N(0, 1) pushed through the transitions of the policy, or of the base chain."""
    model: ToyModel = learner.model  # type: ignore[assignment]
    kernel, n, guidance = learner.kernel, len(GRID), learner.config.sampler.guidance
    density = torch.exp(-GRID.square() / 2) / math.sqrt(2 * math.pi)
    x = GRID.reshape(-1, 1, 1, 1).expand(-1, model.problem.dimensions, 1, 1).float()
    for step in grid(learner)[:-1]:
        t = torch.full((n,), step)
        which = x, t, None, guidance
        output = model.predict_reference(*which) if reference else model.predict(*which)[0]
        mean = kernel.mean(output, t, x)[:, dimension].flatten().double()
        sigma = kernel.variance(torch.tensor([step])).double().sqrt()
        transition = torch.exp(-((GRID[None] - mean[:, None]) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
        density = (density[:, None] * transition).sum(0) * WIDTH
    assert abs(float(density.sum()) * WIDTH - 1) < 1e-2
    return density


@torch.no_grad()
def total_variation(learner: Learner, residual: bool = False, exponent: float = 1.0) -> float:
    """TV of the end to R^exponent, or to base chain x R^exponent; of the joint law if there are two dimensions."""
    problem: Problem = learner.model.problem  # type: ignore[attr-defined]
    judged = base_clean(learner, GRID.reshape(-1, 1, 1, 1)).flatten()
    target = (exponent * problem.log_reward(judged)).exp()
    if residual:
        target = target * push(learner, reference=True)
    target = target / (target.sum() * WIDTH)
    densities = [push(learner, dimension=i) for i in range(problem.dimensions)]
    if problem.dimensions == 1:
        return 0.5 * float((densities[0] - target).abs().sum()) * WIDTH
    joint, wanted = densities[0][:, None] * densities[1], target[:, None] * target
    return 0.5 * float((joint - wanted).abs().sum()) * WIDTH**2


def mean_of_samples(learner: Learner) -> float:
    return float((GRID * push(learner)).sum()) * WIDTH
