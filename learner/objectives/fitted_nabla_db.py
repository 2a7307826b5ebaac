"""Residual nabla-DB (arXiv 2412.07775) whose log-flow is not a network that learns beside the policy, but is fitted.

The forward condition, with F the flow relative to the reference's:

    grad_{x_k+1} log p_F(x_k+1|x_k) = grad_{x_k+1} log p_ref(x_k+1|x_k) + grad log F(x_k+1)

For Gaussian steps it says that mu_theta(x_k) = mu_ref(x_k) + sigma_k^2 grad log F(x_k+1). What log F(x_k) is, sub-
trajectory balance says of any trajectory through x_k:

    log F(x_k) = beta r(x_N) - sum_{j >= k} (log p_F(x_j+1|x_j) - log p_ref(x_j+1|x_j))   at the target, for all

So each epoch, state by state, log F is regressed on that (fitted_flow.py), as a function of the frozen model's clean
prediction, and its gradient carried back through that one prediction. Noise in the right side dies out as the policy
nears the target. No reward's gradient is needed, and one image a trajectory is scored.

The forward-looking form is for rewards with a gradient. Its log F(x_k) is c_k r(xhat(x_k)), xhat being the frozen
model's clean prediction and c_k one fitted number, plus the regression of what that leaves."""

from torch import Tensor

from learner.objectives.base import Flow, Loss, Objective, Transitions
from learner.objectives.needs import NEEDS


class FittedNablaDB(Objective):
    needs = NEEDS["fitted_nabla_db"]
    target = "target proportional to p_ref x exp({beta:g} x reward)"

    def loss(self, batch: Transitions, output: Tensor, flow: Flow, beta: float, flow_gradient: bool) -> Loss:
        """|mu_theta - mu_ref - sigma^2 grad log F|^2 / (2 sigma^2), summed over dimensions: nats."""
        variance = self.kernel.variance(batch.t, batch.x.dtype).reshape(-1, 1, 1, 1)
        weights = self.weights(batch)
        if self.settings.trajectory_weight == "target":
            weights = weights * batch.prepared["target_weight"]
        return self.matching_loss(batch, output, variance * batch.prepared["log_flow_gradient"], weights)


class ForwardFittedNablaDB(FittedNablaDB):
    needs = NEEDS["forward_fitted_nabla_db"]
