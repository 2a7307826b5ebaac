"""What the algorithms as they are usually coded share: one process, a plain guided rollout, densities written out.

The densities are here a second time, on purpose: tests hold losses and gradients of published.py and usual_ddpo.py to
those of the project's learner, which then agree with formulas that they do not share. Both are given what costs nothing
to give: prompts encoded once, the project's U-Net calls, decoder and reward, and all their trajectories on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion import lora
from diffusion.base_model import BaseModel
from diffusion.trajectory import Trajectories
from learner.config import Config
from learner.update import MICRO_BATCH
from rewards.scorer import Scorer


@dataclass
class Rollouts:
    """B trajectories of N transitions on the device; `outputs` are the guided ones, rewards raw and of the images,
    log-probabilities nats per dimension."""

    prompts: tuple[str, ...]
    states: Tensor  # [B, N+1, C, H, W]
    outputs: Tensor  # [B, N, C, H, W]
    rewards: Tensor  # [B]
    log_probs: Tensor  # [B, N]

    @classmethod
    def of(cls, made: Trajectories, rewards: np.ndarray, device: torch.device) -> Rollouts:
        """The project's own trajectories; all transitions must be selected. `rewards` [B] of their images."""
        arrays = (made.states, made.model_output, rewards, made.log_pf / made.states[0, 0].size)
        return cls(made.chunk.prompts, *(torch.from_numpy(np.array(array)).to(device) for array in arrays))

    @classmethod
    def join(cls, parts: Sequence[Rollouts]) -> Rollouts:
        prompts = tuple(prompt for part in parts for prompt in part.prompts)
        fields = ("states", "outputs", "rewards", "log_probs")
        return cls(prompts, *(torch.cat([getattr(part, name) for part in parts]) for name in fields))

    def split(self, count: int) -> list[Rollouts]:
        size = len(self.prompts) // count
        cuts = [slice(i * size, (i + 1) * size) for i in range(count)]
        return [
            Rollouts(self.prompts[cut], self.states[cut], self.outputs[cut], self.rewards[cut], self.log_probs[cut])
            for cut in cuts
        ]


class Usual:
    """The sampler. Shares the model and its adapter with whoever made them."""

    def __init__(self, model: BaseModel, scorer: Scorer, config: Config, micro_batch: int | None = None) -> None:
        """`micro_batch` by default the config's."""
        self.model, self.config = model, config
        self.micro_batch = micro_batch or config.learner.micro_batch or MICRO_BATCH
        self.decode, self.reward = scorer.decoder, scorer.reward
        kernel = model.kernel(config.sampler.steps, config.sampler.eta, config.sampler.grid)  # only for its grid
        self.times = torch.cat([kernel.timesteps, torch.zeros(1, dtype=torch.int64)]).to(model.device)  # [N+1]
        scheduler = DDIMScheduler.from_config(model.scheduler.config)
        self.abar = scheduler.alphas_cumprod.double().to(model.device)
        self.velocity = scheduler.config.prediction_type == "v_prediction"
        self.generator = torch.Generator(model.device).manual_seed(config.run.seed)
        self.policy_parameters = [p for _, p in lora.named(model.unet)]

    @torch.no_grad()
    def sample(self, prompts: Sequence[str]) -> Rollouts:
        """Denoise from fresh noise and score the images; the log-probabilities are computed along the way."""
        model = self.model
        embeddings = model.embed(prompts)
        x = self._noise(len(prompts))
        states, outputs, log_probs = [x], [], []
        for t, t_next in zip(self.times[:-1], self.times[1:], strict=True):
            here, ahead = t.expand(len(x)), t_next.expand(len(x))
            output, _ = model.predict(x, here, embeddings, self.config.sampler.guidance)
            mean, variance = self._forward(output, x, here, ahead)
            x = mean + variance.sqrt() * self._noise(len(prompts))
            log_probs.append(log_normal(x, mean, variance))
            states.append(x)
            outputs.append(output)
        rewards = self.reward(self.decode(x), list(prompts)).to(x.device)
        stacked = (torch.stack(each, 1) for each in (states, outputs))
        return Rollouts(tuple(prompts), *stacked, rewards, torch.stack(log_probs, 1))

    def loss(self, rollouts: Rollouts, row: Tensor, step: Tensor, beta: float) -> Tensor:
        """Mean over the transitions (row, step) [b]."""
        raise NotImplementedError

    def accumulate(self, rollouts: Rollouts, beta: float) -> float:
        """The mean loss over all transitions that objective.last_transition leaves, its gradients added up in
        micro-batches. Each trajectory goes through its steps in an order of its own."""
        count, (_, steps) = len(rollouts.prompts), self.config.objective.span(rollouts.outputs.shape[1])
        order = torch.stack([torch.randperm(steps) for _ in range(count)], 1).flatten()  # [N * B], by position
        rows = torch.arange(count).repeat(steps)
        total = torch.zeros((), device=self.model.device)
        size = self.micro_batch
        for row, step in zip(rows.split(size), order.split(size), strict=True):
            loss = self.loss(rollouts, row, step, beta) * (len(row) / len(rows))
            loss.backward()
            total = total + loss.detach()
        return total.item()

    def step(self, *networks: tuple[Optimizer, list[nn.Parameter]]) -> None:
        """Of optimizers, each with its parameters."""
        for optimizer, parameters in networks:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.learner.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _forward(self, output: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [b, C, H, W] and variance [b, 1, 1, 1] of the DDIM step from t to t_next."""
        after, variance = self._abar(t_next), self._variance(t, t_next)
        clean, epsilon = self._split(output, x, t)
        direction = (1 - after - variance).clamp(min=0).sqrt().to(x)
        return after.sqrt().to(x) * clean + direction * epsilon, variance.to(x)

    def _variance(self, t: Tensor, t_next: Tensor) -> Tensor:
        abar, after = self._abar(t), self._abar(t_next)
        return self.config.sampler.eta**2 * (1 - after) / (1 - abar) * (1 - abar / after)

    def _split(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Clean prediction and noise [b, C, H, W] in what the model says of x."""
        abar = self._abar(t)
        signal, noise = abar.sqrt().to(x), (1 - abar).sqrt().to(x)
        if self.velocity:
            return signal * x - noise * output, signal * output + noise * x
        return (x - noise * output) / signal, output

    def _abar(self, t: Tensor) -> Tensor:
        return self.abar[t].reshape(-1, 1, 1, 1)

    def _noise(self, count: int) -> Tensor:
        return torch.randn((count, *self.model.latent_shape), generator=self.generator, device=self.model.device)


def log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(x; mean, variance) [b] in nats per dimension."""
    each = -((x - mean) ** 2) / (2 * variance) - 0.5 * variance.log() - 0.5 * math.log(2 * math.pi)
    return each.mean((1, 2, 3))
