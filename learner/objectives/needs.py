"""What each objective requires and sets by default. Imports no torch: the configuration is checked without it.

The formulas are one file an objective beside this one; a new objective has an entry here and in by_name.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["dag_db", "dag_kl", "nabla_db", "residual_nabla_db", "residual_nabla_db_no_flow", "ddpo"]
FlowKind = Literal["log_flow", "gradient"]
Weighting = Literal["uniform", "variance"]
Decay = Literal["none", "sqrt_abar", "abar"]
Penalty = Literal["squared", "huber"]
Defaults = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Needs:
    """The config refuses what contradicts these before anything starts; learner, build and plan read them."""

    flow: FlowKind | None = "log_flow"  # the network it trains beside the policy: scalar, vector or none
    reward_gradients: bool = False  # learns from the gradient of the reward
    inner_rewards: bool = True  # uses the rewards of states before the image
    only_inner_rewards: bool = False  # without forward-looking rewards it has nothing to learn from
    prepared_fields: int = 0  # latents a transition that `prepare` returns
    off_policy: bool = False  # older policies' trajectories are valid training data
    uses_ratio: bool = False  # clips the ratio of the current to the rollout policy
    fits_flow: bool = False  # the flow can be fitted alone, on the log p_F that the sampler stored
    compares_groups: bool = False  # transitions are compared within groups of objective.group_size
    # What `objective.setting` changes, key by key, for keys that are not given.
    defaults: Defaults = field(default_factory=lambda: {"corrected": {}, "faithful": {}})


# The published code of DAG: gradient through both flows, psi of the rollout's own weights.
_DAG: Defaults = {"corrected": {}, "faithful": {"detach_next_flow": False, "forward_looking": "snapshot"}}
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

NEEDS: dict[str, Needs] = {
    # The residual is 0 at balance whoever chose the transition.
    "dag_db": Needs(off_policy=True, fits_flow=True, defaults=_DAG),
    # The score-function gradient is only right for the policy's own samples, within the clip.
    "dag_kl": Needs(uses_ratio=True, fits_flow=True, compares_groups=True, defaults=_DAG),
    # Both conditions hold at every transition, whoever chose it.
    "nabla_db": Needs(
        flow="gradient", reward_gradients=True, prepared_fields=4, off_policy=True,
        defaults={"corrected": {**_NABLA, "flow_start": "reference"}, "faithful": _NABLA_FAITHFUL},
    ),
    "residual_nabla_db": Needs(
        flow="gradient", reward_gradients=True, prepared_fields=4, off_policy=True,
        defaults={"corrected": _NABLA, "faithful": _NABLA_FAITHFUL},
    ),
    "residual_nabla_db_no_flow": Needs(
        flow=None, reward_gradients=True, only_inner_rewards=True, prepared_fields=3, off_policy=True,
        defaults={"corrected": _NABLA, "faithful": _NABLA_FAITHFUL},
    ),
    "ddpo": Needs(
        flow=None, uses_ratio=True, inner_rewards=False,
        defaults={setting: {"regulariser": 0.0, "anneal_fraction": 0.0} for setting in ("corrected", "faithful")},
    ),
}  # fmt: skip
