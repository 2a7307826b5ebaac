"""Kernels of rectified-flow models (SD3, SD3.5, FLUX): the Gaussian path alpha = 1 - t, sigma = t, t in [0, 1].

A step goes from t to s < t. States are labelled by what is left to do, N, ..., 1, and 0 for the image: that is `t` in
every call. The network is told `times`, the scheduler's own. The last step, to s = 0, is deterministic: it has no
density, and no objective can train on it."""

from typing import Any

import torch
from torch import Tensor

from diffusion.kernels import GaussianKernel
from diffusion.settings import Reduction

# Settings of FlowMatchEulerDiscreteScheduler that would change the path itself, or its own step: refused unless off.
NOT_FOLLOWED = ("invert_sigmas", "stochastic_sampling")


class FlowKernel(GaussianKernel):
    """p_F(x_s|x_t) = N(alpha_s xhat + sqrt(sigma_s^2 - eta^2 s~^2) epshat, sigma_F^2 I) in terms of

        A = alpha_t / alpha_s,  nu = sigma_t^2 - A^2 sigma_s^2  (p_B's variance),  s~^2 = sigma_s^2 nu / sigma_t^2

    and sigma_F = eta s~, the posterior's given the image, or, calibrated, more (`calibrated`)."""

    def __init__(
        self, sigmas: Tensor, times: Tensor | None = None, eta: float = 1.0, spread: Tensor | None = None
    ) -> None:
        """`sigmas` [N], decreasing, the first at most 1, all above 0; `times` [N], what the network is told, by default
        1000 sigma; `spread` [N] V_t, mean over dimensions of E|x_0 - xhat(x_t)|^2, to calibrate the variance by. Raises
        ValueError for others."""
        if eta > 1:
            raise ValueError(f"eta ({eta}) must be at most 1: more noise than there is at a timestep")
        self.sigmas, self.eta = sigmas.to("cpu", torch.float64), eta
        if not 0 < self.sigmas[-1] <= self.sigmas[0] <= 1 or (self.sigmas[1:] >= self.sigmas[:-1]).any():
            raise ValueError(f"its {len(sigmas)} sigmas must fall from at most 1 to above 0: set fewer sampler.steps")
        self.times = (1000 * self.sigmas if times is None else times).float().cpu()  # [N]
        sigma = _by_label(self.sigmas)
        after = torch.cat([sigma[:1], sigma[:-1]])  # of the state that a step leads to; label 0 leads nowhere
        alpha, alpha_next, square = 1 - sigma, 1 - after, sigma.square().clamp(min=1e-300)
        noising = sigma.square() - (alpha / alpha_next * after).square()
        posterior = after.square() * noising / square
        variance = eta**2 * posterior
        if spread is not None:  # what is left of the image's own variance in the next state; the last step has no noise
            weight = alpha_next - alpha / alpha_next * alpha * after.square() / square
            variance = variance + weight.square() * _by_label(spread.to(torch.float64)) * (after > 0)
        tables = {
            "abar": alpha.square(), "noise": sigma.square(), "abar_next": alpha_next.square(), "sigma": variance,
            "shrink": (alpha / alpha_next).square(), "direction": (after.square() - eta**2 * posterior).clamp(min=0),
            "noising": noising, "noise_next": after.square(),
        }  # fmt: skip
        count = len(sigmas)
        super().__init__(torch.arange(count, 0, -1), "flow", tables, noisy_steps=count - 1)

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, num_steps: int, eta: float = 1.0, sigmas: Any = None, tokens: int | None = None
    ) -> "FlowKernel":
        """Of a FlowMatchEulerDiscreteScheduler, whose grid and shift are read. `sigmas` [N] are what the pipeline hands
        it before the shift, None: nothing; `tokens`, of an image, are what a dynamic shift depends on. Raises a
        ValueError, which names the setting, for one that is not followed."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        own: Any = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        given = own.config
        if faults := [f"{name} is {given[name]}" for name in NOT_FOLLOWED if given.get(name)]:
            raise ValueError(f"its {', its '.join(faults)}, which is not followed here: switch it off")
        shift = {}
        if given.use_dynamic_shifting:
            if tokens is None:
                raise ValueError("its use_dynamic_shifting is true, and this kind of pipeline does not say by how much")
            first, last = given.get("base_image_seq_len", 256), given.get("max_image_seq_len", 4096)
            low, high = given.get("base_shift", 0.5), given.get("max_shift", 1.15)
            shift["mu"] = low + (tokens - first) * (high - low) / (last - first)
        own.set_timesteps(num_steps, sigmas=sigmas, **shift)
        return cls(own.sigmas[:-1], own.timesteps, eta)

    def calibrated(self, spread: Tensor) -> "FlowKernel":
        """The same means with the variance that moments ask for: x_t given, the image is no point but has a variance,
        `spread` [N], of which (alpha_s - A alpha_t sigma_s^2 / sigma_t^2)^2 is in the next state."""
        return FlowKernel(self.sigmas, self.times, self.eta, spread)


def _by_label(values: Tensor) -> Tensor:
    """[N + 1], from values [N] in the grid's order; 0 at label 0."""
    return torch.cat([values.new_zeros(1), values.flip(0)])


class FlowGRPOKernel(FlowKernel):
    """The step of Flow-GRPO (arXiv 2505.05470), for its comparison: with g = a sqrt(t / (1 - t)), where t = 1 counts as
    the grid's second value in g alone, and dt = s - t < 0,

        mean = x (1 + g^2 dt / (2 t)) + v (1 + g^2 (1 - t) / (2 t)) dt,      sigma_F^2 = -g^2 dt

    It is the reverse of no noising kernel: log p_B raises a TypeError."""

    reverses_noising = False

    def __init__(self, sigmas: Tensor, times: Tensor | None = None, a: float = 0.7) -> None:
        super().__init__(sigmas, times)
        tables = self._tables[torch.device("cpu")]
        sigma, after = tables["root_noise"], tables["root_noise_next"]
        inside = torch.where(sigma == 1, sigma[-2], sigma)
        g2 = a**2 * inside / (1 - inside)
        tables["sigma"] = g2 * (sigma - after)
        tables["sigma"][1] = 0  # the last step is without noise
        tables["root_sigma"], tables["step"] = tables["sigma"].sqrt(), after - sigma
        tables["pull"] = g2 / (2 * sigma.clamp(min=1e-300))

    def mean(self, model_output: Tensor, t: Tensor, x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        v, step, pull = model_output.to(x.dtype), self._at("step", t, x), self._at("pull", t, x)
        return x + v * step + pull * step * (x + (1 - self._at("root_noise", t, x)) * v)

    def log_pb(self, t: Tensor, x: Tensor, x_next: Tensor, reduction: Reduction) -> Tensor:
        raise TypeError("Flow-GRPO's step is the reverse of no noising kernel")
