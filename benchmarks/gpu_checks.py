"""Correctness on a device: kernels and objectives against float64 on the CPU.

Parts of benchmarks/gpu.py. The formulas of the steps are written out here a second time, on purpose: what both sides
computed by the same code would agree where both are wrong.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu_worker import Day
from diffusion.flow_kernels import FlowGRPOKernel, FlowKernel
from diffusion.kernels import DDIMKernel, GaussianKernel
from learner.config.sections import Objective as Settings
from learner.objectives.base import Policy, Transitions
from learner.objectives.by_name import OBJECTIVES

CPU = torch.device("cpu")
STEPS, COUNT, SHAPE, BETA = 10, 4, (4, 8, 8), 3.0
NATS = 1e-5  # a dimension, of a density in float32; measured on a CPU: 1e-6
CLOSE = 1e-4  # of the largest number, of a state in float32; measured on a CPU: 3e-7
GRADIENT = 1e-3  # of the norm, of a float32 gradient; measured on a CPU: 2e-5


def exactly() -> None:
    """float32 is float32: TF32 has 10 bits of mantissa, and convolutions use it unless told not to."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@dataclass(frozen=True)
class Case:
    """A grid: signal alpha [N+1] and noise sigma [N+1] of the states, from noise to image, and its kernel."""

    name: str
    kernel: GaussianKernel
    alpha: np.ndarray
    sigma: np.ndarray
    prediction: str
    eta: float = 1.0

    def split(self, output: np.ndarray, x: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Clean prediction and noise."""
        a, s = self.alpha[i], self.sigma[i]
        if self.prediction == "epsilon":
            return (x - s * output) / a, output
        if self.prediction == "v_prediction":
            return a * x - s * output, s * x + a * output
        return x - s * output, x + a * output  # a flow's velocity

    def step(self, output: np.ndarray, x: np.ndarray, i: int) -> tuple[np.ndarray, float]:
        """Mean and variance of p_F."""
        if isinstance(self.kernel, FlowGRPOKernel):
            t, ahead = self.sigma[i], self.sigma[i + 1]
            g2 = self.eta**2 * (inner := self.sigma[1] if t == 1 else t) / (1 - inner)
            return x + ((output * (1 + g2 * (1 - t) / (2 * t))) + g2 / (2 * t) * x) * (ahead - t), g2 * (t - ahead)
        clean, noise = self.split(output, x, i)
        ahead = self.sigma[i + 1] ** 2
        variance = self.eta**2 * ahead * self.noising(i)[1] / self.sigma[i] ** 2
        return self.alpha[i + 1] * clean + math.sqrt(ahead - variance) * noise, variance

    def noising(self, i: int) -> tuple[float, float]:
        """Factor and variance of p_B."""
        shrink = self.alpha[i] / self.alpha[i + 1]
        return shrink, self.sigma[i] ** 2 - (shrink * self.sigma[i + 1]) ** 2


def cases() -> Iterator[Case]:
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # Stable Diffusion's
    times = np.arange(STEPS, 0, -1) * (1000 // STEPS) - 49
    for prediction, eta in (("epsilon", 1.0), ("epsilon", 0.6), ("v_prediction", 1.0)):
        kernel = DDIMKernel(torch.from_numpy(abar), torch.from_numpy(times), prediction, eta)
        states = abar[[*times, 0]]
        yield Case(f"ddim {prediction} {eta:g}", kernel, states**0.5, (1 - states) ** 0.5, prediction, eta)
    sigma = np.linspace(1, 1 / STEPS, STEPS)
    states = np.append(sigma, 0.0)
    for name, flow, eta in (
        ("flow", FlowKernel(torch.from_numpy(sigma)), 1.0),
        ("flow_grpo", FlowGRPOKernel(torch.from_numpy(sigma), a=0.7), 0.7),
    ):
        yield Case(name, flow, 1 - states, states, "flow", eta)


def normal(residual: np.ndarray, variance: float) -> np.ndarray:
    """log N [B], summed over dimensions."""
    each = residual**2 / variance + math.log(2 * math.pi * variance)
    return -0.5 * each.sum((1, 2, 3))


def kernels(day: Day) -> None:
    """Steps and log-probabilities of every kernel, from float32 inputs and from a bfloat16 network's outputs."""
    exactly()
    generator = torch.Generator().manual_seed(0)
    for case in cases():
        worst = {"step": 0.0, "log_pf": 0.0, "log_pb": 0.0}
        for i in range(case.kernel.noisy_steps):
            for dtype in (torch.float32, torch.bfloat16):
                x, noise = (torch.randn(COUNT, *SHAPE, generator=generator) for _ in range(2))
                output = torch.randn(COUNT, *SHAPE, generator=generator).to(dtype)
                t = case.kernel.timesteps[i].expand(COUNT)
                mean, variance = case.step(output.double().numpy(), x.double().numpy(), i)
                expected = mean + math.sqrt(variance) * noise.double().numpy()
                x_next = torch.from_numpy(expected).float()
                here, at, of, to, by = (each.to(day.device) for each in (output, t, x, x_next, noise))
                found = {
                    "step": case.kernel.sample(here, at, of, by),
                    "log_pf": case.kernel.log_pf(here, at, of, to, "sum"),
                }
                wanted = {"step": expected, "log_pf": normal(x_next.double().numpy() - mean, variance)}
                if case.kernel.reverses_noising:
                    shrink, noising = case.noising(i)
                    found["log_pb"] = case.kernel.log_pb(at, of, to, "sum")
                    wanted["log_pb"] = normal((x.double() - shrink * x_next.double()).numpy(), noising)
                for name, value in found.items():
                    apart = float(np.abs(value.double().cpu().numpy() - wanted[name]).max())
                    size = np.abs(expected).max() if name == "step" else x[0].numel()
                    worst[name] = max(worst[name], apart / size) if math.isfinite(apart) else math.nan
        day.check(f"{case.name}: step", worst["step"], CLOSE)
        day.check(f"{case.name}: nats a dimension", max(worst["log_pf"], worst["log_pb"]), NATS)


class Small(nn.Module):
    """Two convolutions: a policy's network, or with `fields` False a flow network with a scalar of each state."""

    def __init__(self, fields: bool = True) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(SHAPE[0], 16, 3, padding=1), nn.Conv2d(16, SHAPE[0], 3, padding=1)
        self.fields = fields

    def forward(self, x: Tensor, t: Tensor, embeddings: Any = None) -> Tensor:
        scale = (1 + t.to(x.dtype) / 1000).reshape(-1, 1, 1, 1)
        values = self.leave(torch.sin(self.enter(x) * scale))
        return values if self.fields else values.flatten(1).sum(1) / 10


class SmallModel:
    """What Policy asks of a base model."""

    def __init__(self, network: Small, reference: Small, device: torch.device) -> None:
        self.network, self.frozen, self.device = network, reference, device

    def predict(self, x: Tensor, t: Tensor, embeddings: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
        output = self.network(x, t)
        return output, output

    def predict_reference(self, x: Tensor, t: Tensor, embeddings: Tensor, guidance: float = 1.0) -> Tensor:
        return self.frozen(x, t)


def objectives(day: Day) -> None:
    """Loss of every objective, and its gradients to policy and flow network, as float32 on the device finds them."""
    exactly()
    apart_from_exact(day, torch.float32)


def apart_from_exact(day: Day, dtype: torch.dtype) -> None:
    for kind in OBJECTIVES:
        exact, found = (loss_and_gradients(kind, *where) for where in ((CPU, torch.float64), (day.device, dtype)))
        size = max(1.0, abs(exact[0]))  # advantages of size 1 cancel in a policy gradient's loss
        day.check(f"{kind}: loss", abs(found[0] - exact[0]) / size, GRADIENT)
        norm = exact[1].norm()
        day.check(f"{kind}: gradient", ((found[1] - exact[1]).norm() / norm).item() if norm else math.nan, GRADIENT)


def loss_and_gradients(kind: str, device: torch.device, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Of all transitions of COUNT trajectories near the policy's, from the same numbers wherever it runs."""
    torch.manual_seed(1)
    network = Small().double()
    reference = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    case = next(case for case in cases() if case.prediction == "v_prediction")
    kernel = case.kernel
    objective = OBJECTIVES[kind](Settings(kind=kind, beta=BETA, group_size=COUNT), kernel)
    needs = objective.needs
    flow = {"log_flow": Small(fields=False), "gradient": Small(), None: None}[needs.flow]
    batch, states, image_gradient = transitions(network, reference, kernel)

    model = SmallModel(network.to(device, dtype), reference.to(device, dtype).requires_grad_(False), device)
    flow = None if flow is None else flow.to(device, dtype)
    batch, policy = moved(batch, device, dtype), Policy(model, 1.0)  # type: ignore[arg-type]
    rewards = batch.reward_terminal.reshape(COUNT, STEPS)[:, 0].tolist()
    nats = np.zeros((COUNT, 0))
    if needs.whole_trajectories:
        ratio = objective.log_pf_old(batch) - objective.log_q(batch)  # type: ignore[attr-defined]
        nats = ratio.detach().double().cpu().reshape(COUNT, STEPS).numpy()
    objective.begin_epoch(range(COUNT), ["a", "b"] * (COUNT // 2), rewards, nats, BETA)
    batch.prepared |= objective.prepare(policy, batch)
    if needs.adjoint:
        carried = objective.carry_back(
            policy, states.to(device, dtype), kernel.timesteps.tolist(), STEPS, batch.embeddings[:COUNT],
            image_gradient.to(device, dtype),
        )  # fmt: skip
        batch.prepared |= {name: value.flatten(0, 1) for name, value in carried.items()}
    objective.prepare_window(policy, [batch], flow, BETA)
    if needs.reward_gradients and flow is not None:
        batch.x.requires_grad_()
    loss, _ = objective.loss(batch, policy.output(batch), flow, BETA, True)
    loss.backward()
    parameters = [*network.parameters(), *(flow.parameters() if flow is not None else ())]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients]).double().cpu()


@torch.no_grad()
def transitions(network: Small, reference: Small, kernel: GaussianKernel) -> tuple[Transitions, Tensor, Tensor]:
    """In float64 on the CPU, with rewards and their gradients at random; the states [B, N+1, C, H, W] that they are of,
    and the reward's gradient to the images."""
    states = [torch.randn(COUNT, *SHAPE, dtype=torch.float64)]
    for timestep in kernel.timesteps:
        t = timestep.expand(COUNT)
        states.append(kernel.sample(network(states[-1], t), t, states[-1], torch.randn_like(states[-1])))
    whole, count = torch.stack(states, 1), COUNT * STEPS
    row, step = torch.arange(COUNT).repeat_interleave(STEPS), torch.arange(STEPS).repeat(COUNT)
    times = torch.cat([kernel.timesteps, torch.zeros(1, dtype=torch.int64)])
    x, x_next, t = whole[row, step], whole[row, step + 1], times[step]
    rewards, slopes = torch.randn(COUNT, STEPS + 1, dtype=torch.float64), torch.randn_like(whole)
    output = network(x, t)
    old = kernel.log_pf(output, t, x, x_next, "sum") + torch.randn(count, dtype=torch.float64) / 20
    batch = Transitions(
        x=x, x_next=x_next, t=t, t_next=times[step + 1], trajectory_id=row,
        embeddings=torch.zeros(count, 0, 0, dtype=torch.float64), reward=rewards[row, step],
        reward_next=rewards[row, step + 1], reward_terminal=rewards[row, STEPS], terminal=step + 1 == STEPS,
        log_pf_old=old, output_old=output, log_ref=kernel.log_pf(reference(x, t), t, x, x_next, "sum"),
        clean_gradient=slopes[row, step], clean_gradient_next=slopes[row, step + 1],
        prepared={  # of fitted flows
            "reference_output": reference(x, t), "log_flow_gradient": torch.randn_like(x),
            "target_weight": torch.rand(count, dtype=torch.float64),
        },
    )  # fmt: skip
    return batch, whole, slopes[:, STEPS]


def moved(batch: Transitions, device: torch.device, dtype: torch.dtype) -> Transitions:
    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    named = {field.name: one(getattr(batch, field.name)) for field in fields(batch) if field.name != "prepared"}
    return replace(batch, **named, prepared={name: one(value) for name, value in batch.prepared.items()})
