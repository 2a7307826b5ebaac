"""DAG-DB as its published algorithm is usually coded (arXiv 2406.00633): the baseline of benchmarks/device.py.

One process and plain loops. Its learner evaluates the forward-looking reward anew at both ends of every transition: a
U-Net pass, a VAE decode and a reward call each, under the weights as they stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.usual import Rollouts, Usual, log_normal
from diffusion.base_model import BaseModel
from learner.config import Config
from rewards.scorer import Scorer


class Published(Usual):
    """Sampler and learner in one. Shares the model and its adapter with whoever made them."""

    def __init__(
        self, model: BaseModel, scorer: Scorer, flow: nn.Module, config: Config, micro_batch: int | None = None
    ) -> None:
        """`flow` is this learner's own, on the model's device; `micro_batch` by default the config's."""
        super().__init__(model, scorer, config, micro_batch)
        self.flow = flow
        self.start = {name: value.clone() for name, value in flow.state_dict().items()}
        self.reset()

    def reset(self) -> None:
        """Fresh optimizers and the first flow network; the adapter is the caller's to put back."""
        self.flow.load_state_dict(self.start)
        self.flow_parameters = list(self.flow.parameters())
        settings: dict[str, Any] = {"weight_decay": self.config.learner.weight_decay}
        self.policy_optimizer = AdamW(self.policy_parameters, lr=self.config.learner.learning_rate, **settings)
        self.flow_optimizer = AdamW(self.flow_parameters, lr=self.config.flow.learning_rate, **settings)

    def train(self, rollouts: Rollouts, beta: float, updates: int) -> list[float]:
        """One optimizer step of both networks on each of `updates` equal parts; their losses."""
        networks = ((self.policy_optimizer, self.policy_parameters), (self.flow_optimizer, self.flow_parameters))
        losses = []
        for part in rollouts.split(updates):
            losses.append(self.accumulate(part, beta))
            self.step(*networks)
        return losses

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
        log_pf = log_normal(x_next, mean, variance)
        log_pb = log_normal(x, shrink.sqrt().to(x) * x_next, (1 - shrink).to(x))
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
