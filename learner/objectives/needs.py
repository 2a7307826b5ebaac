"""What each objective requires and sets by default. Imports no torch: the configuration is checked without it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "dag_db", "dag_kl", "nabla_db", "residual_nabla_db", "residual_nabla_db_no_flow", "ddpo",
    "rtb", "rsub", "rdb", "tb", "sub_tb", "grpo", "adjoint_matching",
    "fitted_nabla_db", "forward_fitted_nabla_db",
]  # fmt: skip
FlowKind = Literal["log_flow", "gradient"]
Weighting = Literal["uniform", "variance"]
Decay = Literal["none", "sqrt_abar", "abar"]
Penalty = Literal["squared", "huber"]
Defaults = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Needs:
    """The config refuses what contradicts these before anything starts; learner, build and plan read them."""

    defaults: Defaults  # what `objective.setting` changes, key by key, for keys that are not given
    flow: FlowKind | None = None  # the network it trains beside the policy: a scalar, or a field
    uses_ratio: bool = False  # clips the ratio of the current to the rollout policy, so must train on its own samples
    reward_gradients: bool = False  # learns from the gradient of the reward
    inner_rewards: bool = True  # uses the rewards of states before the image
    prepared_fields: int = 0  # latents a transition that `prepare` returns
    compares_groups: bool = False  # transitions are compared within groups of objective.group_size
    noising_kernel: bool = False  # has p_B in it, to which the sampler's steps belong at eta 1 alone
    reference: bool = False  # compares with the frozen reference's densities, which the sampler then adds
    adjoint: bool = False  # carries the image's reward gradient back along trajectories
    fitted_flow: bool = False  # its log-flow is fitted, once an epoch (learner/fitted_flow.py)
    least_squares: bool = False  # its policy part is a sum of squares, for learner.optimizer=natural
    free_constant: bool = False  # residuals of a prompt share a constant, log Z, that is left to the data
    residual: bool = False  # its target is p_ref exp(beta r)
    # The expected reward, and so has no target that rewards on another scale would change. Its rewards are those that
    # `begin_epoch` gets: with reward.options.normalise of standardised parts.
    maximises: bool = False
    whole_trajectories: bool = False  # a loss of trajectories: all transitions of the window are trained on together


# The published code of DAG: gradient through both flows, psi of the rollout's own weights.
_DAG: Defaults = {
    "corrected": {}, "faithful": {"detach_next_flow": False, "forward_looking": "snapshot", "reward_offset": 0.0},
}  # fmt: skip
_NABLA: Mapping[str, Any] = {
    "clean_prediction": "guided", "forward_looking_decay": "abar", "transition_weight": "variance",
    "anneal_fraction": 0.0,
}  # fmt: skip
# The published code of nabla-DB (of the residual form: it has no other): the reward's gradient under the rollout's
# weights, gradient through both flows, no reverse loss at the last transition, gamma_0 = abar_0, no annealing.
_NABLA_FAITHFUL: Mapping[str, Any] = {
    "clean_prediction": "guided", "forward_looking_decay": "abar", "forward_looking": "snapshot",
    "detach_next_flow": False, "reverse_transitions": "inner", "decay_terminal": True, "regulariser": 1000.0,
    "anneal_fraction": 0.0,
}  # fmt: skip
_RESIDUAL: Defaults = {"corrected": _NABLA, "faithful": _NABLA_FAITHFUL}
_PLAIN: Defaults = {**_RESIDUAL, "corrected": {**_NABLA, "flow_start": "reference"}}
# Every exponent is the true one, nothing is held to where an epoch began, and one image a trajectory is scored.
_EXACT: Mapping[str, Any] = {
    "log_prob_reduction": "sum", "beta": 1.0, "anneal_fraction": 0.0, "regulariser": 0.0, "forward_looking": "none",
}  # fmt: skip
_BALANCE: Defaults = {key: _EXACT for key in ("corrected", "faithful")}
_FORWARD: Defaults = {
    key: {**_EXACT, "forward_looking": "base", "clean_prediction": "guided"} for key in ("corrected", "faithful")
}
_WHOLE: Mapping[str, Any] = {"whole_trajectories": True, "least_squares": True}
_GRPO: Defaults = {key: {**_EXACT, "clip_range": 0.2} for key in ("corrected", "faithful")}
_DDPO: Defaults = {key: {"regulariser": 0.0, "anneal_fraction": 0.0} for key in ("corrected", "faithful")}

NEEDS: dict[str, Needs] = {
    # The residual is 0 at balance whoever chose the transition; so are both conditions of nabla-DB.
    "dag_db": Needs(_DAG, "log_flow", noising_kernel=True, least_squares=True),
    # The score-function gradient is only right for the policy's own samples, within the clip.
    "dag_kl": Needs(_DAG, "log_flow", uses_ratio=True, compares_groups=True, noising_kernel=True),
    "nabla_db": Needs(_PLAIN, "gradient", reward_gradients=True, prepared_fields=4, noising_kernel=True),
    "residual_nabla_db": Needs(_RESIDUAL, "gradient", reward_gradients=True, prepared_fields=4, residual=True),
    "residual_nabla_db_no_flow": Needs(_RESIDUAL, reward_gradients=True, prepared_fields=2),
    "ddpo": Needs(_DDPO, uses_ratio=True, inner_rewards=False, maximises=True),
    "rtb": Needs(_BALANCE, inner_rewards=False, reference=True, residual=True, **_WHOLE, free_constant=True),
    "rsub": Needs(_BALANCE, "log_flow", reference=True, residual=True, **_WHOLE),
    "rdb": Needs(_BALANCE, "log_flow", reference=True, residual=True, least_squares=True),
    "tb": Needs(_BALANCE, inner_rewards=False, noising_kernel=True, **_WHOLE, free_constant=True),
    "sub_tb": Needs(_BALANCE, "log_flow", noising_kernel=True, **_WHOLE),
    "grpo": Needs(_GRPO, uses_ratio=True, inner_rewards=False, maximises=True),
    "adjoint_matching": Needs(
        _BALANCE, reward_gradients=True, inner_rewards=False, adjoint=True, residual=True, prepared_fields=2
    ),
    "fitted_nabla_db": Needs(_BALANCE, inner_rewards=False, fitted_flow=True, residual=True, prepared_fields=3),
    "forward_fitted_nabla_db": Needs(
        _FORWARD, reward_gradients=True, fitted_flow=True, residual=True, prepared_fields=3
    ),
}
