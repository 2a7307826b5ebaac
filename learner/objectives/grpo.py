"""GRPO: clipped policy gradient on rewards compared within the prompt (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv
2505.07818). A yardstick: it maximises the expected reward and has no target distribution.

Every trained transition of a trajectory carries the same advantage, (r - mean) / std over the prompt's trajectories of
the epoch. `objective.window` trains a part of the transitions, as MixGRPO (arXiv 2507.21802) with sampler.noise=window.
`objective.reference_kl` adds KL(p_F || p_ref) of each transition, exact: |mu - mu_ref|^2 / (2 sigma_t^2)."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from learner.config.sections import Objective as Settings
from learner.objectives.base import ADVANTAGE_LIMIT, Flow, Loss, Objective, Policy, Transitions
from learner.objectives.needs import NEEDS


class GRPO(Objective):
    """Clipped loss, and reference_kl times the KL in nats, means over transitions."""

    needs = NEEDS["grpo"]
    target = "no exact target: it maximises the expected reward, and beta does not matter"
    _advantages: dict[int, float]  # of the epoch's trajectories, by id

    @classmethod
    def extra_passes(cls, settings: Settings) -> int:
        return super().extra_passes(settings) + (settings.reference_kl > 0)

    def begin_epoch(
        self, ids: Sequence[int], prompts: Sequence[str], rewards: Sequence[float], nats: np.ndarray, beta: float
    ) -> None:
        self._advantages = dict(zip(ids, within_prompts(prompts, rewards).tolist(), strict=True))

    def prepare(self, policy: Policy, batch: Transitions) -> dict[str, Tensor]:
        values = [self._advantages[number] for number in batch.trajectory_id.tolist()]
        prepared = {"advantage": torch.tensor(values, dtype=batch.reward.dtype, device=batch.x.device)}
        if self.settings.reference_kl:
            with torch.no_grad():
                prepared["reference_output"] = policy.reference(batch.x, batch.t, batch.embeddings)
        return prepared | super().prepare(policy, batch)

    def loss(self, batch: Transitions, output: Tensor, flow: Flow, beta: float, flow_gradient: bool) -> Loss:
        loss, parts = self.policy_loss(batch, self.log_pf(batch, output), batch.prepared["advantage"])
        if self.settings.reference_kl:
            reference = batch.prepared["reference_output"]
            parts["reference_kl"] = self.kernel.divergence(output, reference, batch.t, batch.x).mean()
            loss = loss + self.settings.reference_kl * parts["reference_kl"]
        return loss, parts


def within_prompts(prompts: Sequence[str], rewards: Sequence[float]) -> np.ndarray:
    """Advantages [n] of trajectories: (r - mean) / (std + 1e-4) over those of the same prompt, clipped to +-5. 0 of a
    prompt's only one."""
    raw, rows = np.asarray(rewards, np.float64), defaultdict(list)
    for row, prompt in enumerate(prompts):
        rows[prompt].append(row)
    advantages = np.zeros_like(raw)
    for group in rows.values():
        own = raw[group]
        advantages[group] = (own - own.mean()) / (own.std() + 1e-4)
    return advantages.clip(-ADVANTAGE_LIMIT, ADVANTAGE_LIMIT)
