"""DAG-DB as its published algorithm is usually coded (arXiv 2406.00633): the baseline of benchmarks/device.py.

One process and plain loops. Its learner evaluates the forward-looking reward anew at both ends of every transition: a
U-Net pass, a VAE decode and a reward call each, under the weights as they stand. The densities are written out here a
second time, on purpose: a test holds its loss and gradients equal to the project's learner's, which then agree with
formulas they do not share.

It is given what costs nothing to give: prompts encoded once, the project's U-Net calls, decoder and reward, and all of
its trajectories on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.optim import AdamW

from diffusion import lora
from diffusion.base_model import BaseModel
from diffusion.trajectory import Trajectories
from learner.config import Config
from learner.update import MICRO_BATCH
from rewards.scorer import Scorer


@dataclass
class Rollouts:
    """B trajectories of N transitions on the device; `outputs` are the guided ones, rewards raw and of the images."""

    prompts: tuple[str, ...]
    states: Tensor  # [B, N+1, C, H, W]
    outputs: Tensor  # [B, N, C, H, W]
    rewards: Tensor  # [B]

    @classmethod
    def of(cls, made: Trajectories, rewards: np.ndarray, device: torch.device) -> Rollouts:
        """The project's own trajectories; all transitions must be selected. `rewards` [B] of their images."""
        arrays = (made.states, made.model_output, rewards)
        return cls(made.chunk.prompts, *(torch.from_numpy(np.array(array)).to(device) for array in arrays))

    @classmethod
    def join(cls, parts: Sequence[Rollouts]) -> Rollouts:
        prompts = tuple(prompt for part in parts for prompt in part.prompts)
        fields = ("states", "outputs", "rewards")
        return cls(prompts, *(torch.cat([getattr(part, name) for part in parts]) for name in fields))

    def split(self, count: int) -> list[Rollouts]:
        size = len(self.prompts) // count
        cuts = [slice(i * size, (i + 1) * size) for i in range(count)]
        return [Rollouts(self.prompts[cut], self.states[cut], self.outputs[cut], self.rewards[cut]) for cut in cuts]


class Published:
    """Sampler and learner in one. Shares the model and its adapter with whoever made them."""

    def __init__(
        self, model: BaseModel, scorer: Scorer, flow: nn.Module, config: Config, micro_batch: int | None = None
    ) -> None:
        """`flow` is this learner's own, on the model's device; `micro_batch` by default the config's."""
        self.model, self.flow, self.config = model, flow, config
        self.micro_batch = micro_batch or config.learner.micro_batch or MICRO_BATCH
        self.decode, self.reward = scorer.decoder, scorer.reward
        kernel = model.kernel(config.sampler.steps, config.sampler.eta, config.sampler.grid)  # only for its grid
        self.times = torch.cat([kernel.timesteps, torch.zeros(1, dtype=torch.int64)]).to(model.device)  # [N+1]
        scheduler = DDIMScheduler.from_config(model.scheduler.config)
        self.abar = scheduler.alphas_cumprod.double().to(model.device)
        self.velocity = scheduler.config.prediction_type == "v_prediction"
        self.generator = torch.Generator(model.device).manual_seed(config.run.seed)
        self.start = {name: value.clone() for name, value in flow.state_dict().items()}
        self.reset()

    def reset(self) -> None:
        """Fresh optimizers and the first flow network; the adapter is the caller's to put back."""
        self.flow.load_state_dict(self.start)
        self.policy_parameters = [p for _, p in lora.named(self.model.unet)]
        self.flow_parameters = list(self.flow.parameters())
        settings: dict[str, Any] = {"weight_decay": self.config.learner.weight_decay}
        self.policy_optimizer = AdamW(self.policy_parameters, lr=self.config.learner.learning_rate, **settings)
        self.flow_optimizer = AdamW(self.flow_parameters, lr=self.config.flow.learning_rate, **settings)

    @torch.no_grad()
    def sample(self, prompts: Sequence[str]) -> Rollouts:
        """Denoise from fresh noise and score the images; the log-probabilities are computed along the way, as the
        published sampler does for the objectives that need them."""
        model = self.model
        embeddings = model.embed(prompts)
        x = self._noise(len(prompts))
        states, outputs, log_probs = [x], [], []
        for t, t_next in zip(self.times[:-1], self.times[1:], strict=True):
            here, ahead = t.expand(len(x)), t_next.expand(len(x))
            output, _ = model.predict(x, here, embeddings, self.config.sampler.guidance)
            mean, variance = self._forward(output, x, here, ahead)
            x = mean + variance.sqrt() * self._noise(len(prompts))
            log_probs.append(_log_normal(x, mean, variance))
            states.append(x)
            outputs.append(output)
        rewards = self.reward(self.decode(x), list(prompts)).to(x.device)
        return Rollouts(tuple(prompts), torch.stack(states, 1), torch.stack(outputs, 1), rewards)

    def train(self, rollouts: Rollouts, beta: float, updates: int) -> list[float]:
        """One optimizer step of both networks on each of `updates` equal parts; their losses."""
        return [self._update(part, beta) for part in rollouts.split(updates)]

    def _update(self, rollouts: Rollouts, beta: float) -> float:
        loss = self.accumulate(rollouts, beta)
        for optimizer, parameters in (
            (self.policy_optimizer, self.policy_parameters),
            (self.flow_optimizer, self.flow_parameters),
        ):
            torch.nn.utils.clip_grad_norm_(parameters, self.config.learner.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    def accumulate(self, rollouts: Rollouts, beta: float) -> float:
        """The mean loss over all transitions, its gradients added up in micro-batches. Each trajectory goes through
        its steps in an order of its own."""
        count, steps = rollouts.outputs.shape[:2]
        order = torch.stack([torch.randperm(steps) for _ in range(count)], 1).flatten()  # [N * B], by position
        rows = torch.arange(count).repeat(steps)
        total = torch.zeros((), device=self.model.device)
        size = self.micro_batch
        for row, step in zip(rows.split(size), order.split(size), strict=True):
            share = len(row) / len(rows)
            loss = self.loss(rollouts, row, step, beta) * share
            loss.backward()
            total += loss.detach()
        return total.item()

    def loss(self, rollouts: Rollouts, row: Tensor, step: Tensor, beta: float) -> Tensor:
        """Eq. 8 with forward-looking flows, mean over the transitions (row, step) [b], and the regulariser."""
        prompts = [rollouts.prompts[i] for i in row.tolist()]
        row, step = row.to(self.model.device), step.to(self.model.device)
        embeddings = self.model.embed(prompts)
        x, x_next = rollouts.states[row, step], rollouts.states[row, step + 1]
        t, t_next = self.times[step], self.times[step + 1]
        psi = beta * self._looking_forward(x, t, embeddings, prompts)
        psi_next = beta * self._looking_forward(x_next, t_next, embeddings, prompts)
        flow, flow_next = self.flow(x, t, embeddings), self.flow(x_next, t_next, embeddings)
        output, _ = self.model.predict(x, t, embeddings, self.config.sampler.guidance)
        mean, variance = self._forward(output, x, t, t_next)
        shrink = self._abar(t) / self._abar(t_next)
        log_pf = _log_normal(x_next, mean, variance)
        log_pb = _log_normal(x, shrink.sqrt().float() * x_next, (1 - shrink).float())
        log_reward = beta * rollouts.rewards[row]
        ahead = torch.where(step + 1 == len(self.times) - 1, log_reward, flow_next + psi_next)
        delta = flow + psi + log_pf - log_pb - ahead
        change = (output - rollouts.outputs[row, step]).square().mean()
        return delta.square().mean() + self.config.objective.regulariser * change

    @torch.no_grad()
    def _looking_forward(self, x: Tensor, t: Tensor, embeddings: Tensor, prompts: list[str]) -> Tensor:
        """r(decode(xhat(x_t))) [b] of the conditional output, under the weights as they stand."""
        _, output = self.model.predict(x, t, embeddings, 1.0)
        clean, _ = self._split(output, x, t)
        return self.reward(self.decode(clean), prompts).to(x.device)

    def _forward(self, output: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [b, C, H, W] and variance [b, 1, 1, 1] of the DDIM step from t to t_next."""
        abar, after = self._abar(t), self._abar(t_next)
        variance = self.config.sampler.eta**2 * (1 - after) / (1 - abar) * (1 - abar / after)
        clean, epsilon = self._split(output, x, t)
        return after.sqrt().float() * clean + (1 - after - variance).clamp(
            min=0
        ).sqrt().float() * epsilon, variance.float()

    def _split(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Clean prediction and noise [b, C, H, W] in what the model says of x."""
        abar = self._abar(t)
        signal, noise = abar.sqrt().float(), (1 - abar).sqrt().float()
        if self.velocity:
            return signal * x - noise * output, signal * output + noise * x
        return (x - noise * output) / signal, output

    def _abar(self, t: Tensor) -> Tensor:
        return self.abar[t].reshape(-1, 1, 1, 1)

    def _noise(self, count: int) -> Tensor:
        return torch.randn((count, *self.model.latent_shape), generator=self.generator, device=self.model.device)


def _log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """log N(x; mean, variance) [b] in nats per dimension."""
    each = -((x - mean) ** 2) / (2 * variance) - 0.5 * variance.log() - 0.5 * math.log(2 * math.pi)
    return each.mean((1, 2, 3))
