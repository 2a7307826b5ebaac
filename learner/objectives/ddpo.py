"""DDPO: clipped policy gradient on the reward of the image (arXiv 2305.13301). The baseline to beat.

Every transition of a trajectory carries the same standardised reward; there is no flow network."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from learner.objectives.base import ADVANTAGE_LIMIT, Flow, Loss, Objective, Policy, Transitions
from learner.objectives.needs import NEEDS

HISTORY = 16  # rewards remembered of a prompt, and needed before its own statistics count


class DDPO(Objective):
    """Advantage = (R - mean) / std over the epoch's trajectories on all ranks, or over the prompt's last 16."""

    needs = NEEDS["ddpo"]
    target = "no exact target: it maximises the expected reward, and beta does not matter"
    _advantages: dict[int, float]  # of the epoch's trajectories, by id

    def begin_epoch(
        self, ids: Sequence[int], prompts: Sequence[str], rewards: Sequence[float], nats: np.ndarray, beta: float
    ) -> None:
        values = advantages(prompts, rewards, self.memory if self.settings.advantage == "prompt" else None)
        self._advantages = dict(zip(ids, values.tolist(), strict=True))

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        values = [self._advantages[number] for number in batch.trajectory_id.tolist()]
        advantage = torch.tensor(values, dtype=batch.x.dtype, device=batch.x.device)
        return {"advantage": advantage, **super().prepare(policy, batch)}

    def loss(self, batch: Transitions, output: Tensor, flow: Flow, beta: float, flow_gradient: bool) -> Loss:
        return self.policy_loss(batch, self.log_pf(batch, output), batch.prepared["advantage"])


def advantages(prompts: Sequence[str], raw: Sequence[float], history: dict[str, list[float]] | None) -> np.ndarray:
    """Advantages [n] of trajectories with `raw` rewards, clipped to +-5: (R - mean) / (std + 1e-8) over all. With
    `history`, to which they are added, a prompt that has 16 by then is standardised by its own (std + 1e-6)."""
    rewards = np.asarray(raw, np.float64)
    result = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    if history is not None:
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            history[prompt] = [*history.get(prompt, []), reward][-HISTORY:]
        for i, prompt in enumerate(prompts):
            known = np.asarray(history[prompt])
            if len(known) == HISTORY:
                result[i] = (rewards[i] - known.mean()) / (known.std() + 1e-6)
    return result.clip(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)
