"""Adjoint matching (arXiv 2409.08861): the reward's gradient, carried back along whole trajectories.

The target p_ref exp(beta r) moves the mean of a transition to

    mu(x_k) = mu_ref(x_k) + sigma_k^2 beta E[a_k+1 | x_k],   a_k+1 = J_ref(x_k+1)^T ... J_ref(x_N-1)^T grad r(x_N)

over its own continuations, J_ref(x_j) being the Jacobian of the frozen model's step from x_j (the "lean" adjoint: not
the policy's). So the loss is a regression on single trajectories' a:

    sum over dimensions of |mu_theta(x_k) - mu_ref(x_k) - sigma_k^2 beta a_k+1|^2 / (2 sigma_k^2)

in nats, and the mean over transitions. It has no flow network: no value must first be right. a is 4 to 6 times as noisy
as its mean (measured on the embedded model), a single reward hundreds of times. At its fixed point means are exact, as
far as the variances of the steps, which stay as they are, allow: moment-matched Gaussian steps."""

import torch
from torch import Tensor

from learner.objectives.base import Flow, Loss, Objective, Policy, Transitions
from learner.objectives.needs import NEEDS


class AdjointMatching(Objective):
    needs = NEEDS["adjoint_matching"]
    target = "target proportional to p_ref x exp({beta:g} x reward)"

    def carry_back(
        self, policy: Policy, states: Tensor, times: list[int], noisy: int, embeddings: Tensor, gradient: Tensor
    ) -> dict[str, Tensor]:
        """Of b trajectories with `states` [b, N+1, C, H, W] at `times` (N of them), noise in the first `noisy`
        transitions, and the raw reward's `gradient` [b, C, H, W] to the image's latents: by trained transition, [b, K,
        C, H, W] each, the adjoint and the reference's output."""
        first, end = self.settings.span(len(times))
        adjoint, adjoints, outputs = gradient, [], []
        for step in reversed(range(first, len(times))):
            if step < end:
                adjoints.append(adjoint)
            x, t = states[:, step], torch.full((len(states),), times[step], device=states.device)
            with torch.enable_grad():
                x = x.detach().requires_grad_(step > first)
                output = policy.reference(x, t, embeddings)
                advance = self.kernel.mean if step < noisy else self.kernel.without_noise
                if step > first:
                    adjoint = torch.autograd.grad(advance(output, t, x), x, adjoint)[0]
            if step < end:
                outputs.append(output.detach())
        stacked = (torch.stack(part[::-1], 1) for part in (adjoints, outputs))
        return dict(zip(("adjoint", "reference_output"), stacked, strict=True))

    def loss(self, batch: Transitions, output: Tensor, flow: Flow, beta: float, flow_gradient: bool) -> Loss:
        variance = self.kernel.variance(batch.t, batch.x.dtype).reshape(-1, 1, 1, 1)
        weights = self.weights(batch)
        return self.matching_loss(batch, output, variance * beta * batch.prepared["adjoint"], weights)
