"""Residual detailed balance: DAG-DB (db.py) against the frozen reference model in place of the noising kernel.

    delta = log F(x_t) + log p_F(x_t'|x_t) - log p_ref(x_t'|x_t) - log F(x_t')

F is the flow relative to the reference's own: log F(x_t) = log E_ref[exp(beta r(x_0)) | x_t] at balance, so nothing of
it is known without a network, and the target is p_ref exp(beta r), its form the relative trajectory balance of
arXiv 2405.20971 for one transition."""

import torch
from torch import Tensor

from learner.objectives.base import Transitions
from learner.objectives.db import DagDB
from learner.objectives.needs import NEEDS
from learner.objectives.trajectory import log_reference


class ResidualDB(DagDB):
    needs = NEEDS["rdb"]
    target = "target proportional to p_ref x exp({exponent} x reward)"

    def known(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.zeros(len(x), dtype=x.dtype, device=x.device)

    def log_other(self, batch: Transitions) -> Tensor:
        return log_reference(batch, self.settings.log_prob_reduction)
