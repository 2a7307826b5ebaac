"""DDPO (arXiv 2305.13301) as it is usually coded: guided rollout with log-probabilities, decode and reward of images,
clipped policy gradient over all of an epoch's transitions. A yardstick of benchmarks/race.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import AdamW

from benchmarks.usual import Rollouts, Usual, log_normal
from diffusion.base_model import BaseModel
from learner.config import Config
from rewards.scorer import Scorer

MOST = 5.0  # of an advantage


class UsualDDPO(Usual):
    """Sampler and learner in one. Shares the model and its adapter with whoever made them."""

    def __init__(self, model: BaseModel, scorer: Scorer, config: Config, micro_batch: int | None = None) -> None:
        super().__init__(model, scorer, config, micro_batch)
        rate, decay = config.learner.learning_rate, config.learner.weight_decay
        self.optimizer = AdamW(self.policy_parameters, lr=rate, weight_decay=decay)
        variance = self._variance(self.times[:-1], self.times[1:]).flatten()
        self.weights = torch.ones_like(variance)
        if config.objective.transition_weight == "variance":
            self.weights = variance / variance.mean()

    def train(self, rollouts: Rollouts, beta: float, updates: int) -> list[float]:
        """One optimizer step on each of `updates` equal parts; their losses. There is no beta."""
        losses = []
        for part in self.compared(rollouts).split(updates):
            losses.append(self.accumulate(part, beta))
            self.step((self.optimizer, self.policy_parameters))
        return losses

    @staticmethod
    def compared(rollouts: Rollouts) -> Rollouts:
        """With advantages for rewards: standardised over the epoch, at most 5."""
        rewards = rollouts.rewards.double()
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)
        return replace(rollouts, rewards=advantages.clamp(-MOST, MOST).to(rollouts.states.dtype))

    def loss(self, rollouts: Rollouts, row: Tensor, step: Tensor, beta: float) -> Tensor:
        """Clipped, mean over the transitions (row, step) [b]; `rollouts` are compared ones."""
        row, step = row.to(self.model.device), step.to(self.model.device)
        x, t, t_next = rollouts.states[row, step], self.times[step], self.times[step + 1]
        embeddings = self.model.embed([rollouts.prompts[i] for i in row.tolist()])
        output, _ = self.model.predict(x, t, embeddings, self.config.sampler.guidance)
        log_prob = log_normal(rollouts.states[row, step + 1], *self._forward(output, x, t, t_next))
        ratio, advantage = (log_prob - rollouts.log_probs[row, step]).exp(), rollouts.rewards[row]
        clip = self.config.objective.clip_range
        each = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
        return (self.weights[step].to(each) * each).mean()
