"""Where each objective's gradient goes, by torch.autograd.gradcheck, and where it must not go."""

from functools import partial

import pytest
import torch
from test_slow_loops import BETA, FieldFlow, ScalarFlow, setup
from torch import nn

from learner.objectives.base import clipped
from learner.objectives.kl import leave_one_out
from learner.objectives.needs import NEEDS

gradcheck = partial(torch.autograd.gradcheck, fast_mode=True)  # along random directions


class Given(nn.Module):
    """A flow by its values at x, and where it is asked for both ends at x_next."""

    def __init__(self, here: torch.Tensor, after: torch.Tensor | None = None) -> None:
        super().__init__()
        self.here, self.after = here, after

    def forward(self, x, t, embeddings):
        return self.here if self.after is None else torch.cat([self.here, self.after])


def flows(s, kind):
    flow = ScalarFlow() if NEEDS[kind].flow == "log_flow" else FieldFlow()
    x = s.batch.x.detach()
    return [flow(end, t, None).requires_grad_() for end, t in ((x, s.batch.t), (s.batch.x_next, s.batch.t_next))]


def part(s, name, output, here, after):
    return s.objective.loss(s.batch, output, Given(here, after), BETA, True)[1][name]


def gradient(value, to):
    found = torch.autograd.grad(value, to, allow_unused=True, retain_graph=True)[0]
    return torch.zeros_like(to) if found is None else found


def test_dag_db_trains_policy_and_as_published_both_flows():
    s = setup("dag_db", setting="faithful")
    output, (here, after) = s.output.detach().requires_grad_(), flows(s, "dag_db")
    assert gradcheck(lambda *tensors: part(s, "balance", *tensors), (output, here, after))
    at_end = gradient(part(s, "balance", output, here, after), after)[s.batch.terminal]
    assert (at_end == 0).all()
    s = setup("dag_db")  # corrected: it stops at the next flow
    output, (here, after) = s.output.detach().requires_grad_(), flows(s, "dag_db")
    assert gradcheck(lambda o, h: part(s, "balance", o, h, after.detach()), (output, here))
    assert (gradient(part(s, "balance", output, here, after), after) == 0).all()


def test_residual_db_trains_policy_and_the_flow_at_x():
    s = setup("rdb")
    output, (here, after) = s.output.detach().requires_grad_(), flows(s, "rdb")
    assert gradcheck(lambda o, h: part(s, "balance", o, h, after.detach()), (output, here))
    assert (gradient(part(s, "balance", output, here, after), after) == 0).all()


@pytest.mark.parametrize("kind", ["rtb", "tb"])
@pytest.mark.parametrize("settings", [{}, {"log_z": "learned", "penalty": "huber", "log_prob_reduction": "mean"}])
def test_trajectory_balance_trains_the_policy_alone(kind, settings):
    s = setup(kind, **settings)
    output = s.output.detach().requires_grad_()
    assert gradcheck(lambda o: s.objective.loss(s.batch, o, None, BETA, True)[0], (output,))
    assert not s.objective.goal(s.batch, BETA).requires_grad and not s.objective.log_q(s.batch).requires_grad


@pytest.mark.parametrize("kind", ["rsub", "sub_tb"])
@pytest.mark.parametrize("settings", [{}, {"segments": "all", "detach_next_flow": False, "segment_decay": 0.7}])
def test_sub_trajectory_balance_trains_policy_and_flow(kind, settings):
    s = setup(kind, **settings)
    output, here = s.output.detach().requires_grad_(), flows(s, kind)[0]
    assert gradcheck(lambda o, h: s.objective.loss(s.batch, o, Given(h), BETA, True)[0], (output, here))
    assert gradcheck(lambda h: s.objective.flow_loss(s.batch, Given(h), BETA), (here,))
    held = s.objective.loss(s.batch, output, Given(here), BETA, False)[0]
    assert (gradient(held, here) == 0).all() and gradient(held, output).abs().sum() > 0


@pytest.mark.parametrize("detach", [True, False])
def test_a_segment_trains_the_flow_that_it_begins_with_and_as_published_that_it_ends_with(detach):
    s = setup("rsub", segments="all", detach_next_flow=detach)
    log_flow = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    delta, weights = s.objective.residuals(torch.zeros_like(log_flow), log_flow, log_flow[:, 0].detach())
    found = sorted(tuple(gradient(each, log_flow)[0].tolist()) for each in delta[0])
    ends = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]  # of the segments to the image
    inner = [(1, 0, 0), (1, 0, 0), (0, 1, 0)] if detach else [(1, -1, 0), (1, 0, -1), (0, 1, -1)]
    assert found == sorted(ends + inner) and weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["rtb", "tb", "rsub", "sub_tb"])
def test_a_transitions_weight_scales_its_gradient_and_no_residual(kind):
    losses, gradients = [], []
    for weight in ("uniform", "variance"):
        s = setup(kind, transition_weight=weight)
        output, flow = s.output.detach().requires_grad_(), s.flow
        losses.append(s.objective.loss(s.batch, output, flow, BETA, True)[0])
        gradients.append(gradient(losses[-1], output))
    assert losses[0] == losses[1]
    torch.testing.assert_close(gradients[1], gradients[0] * s.objective.weights(s.batch)[:, None, None, None])


def test_dag_kl_policy_and_flow_learn_from_their_own_term_alone():
    s = setup("dag_kl", group_size=5, clip_range=0.02, setting="faithful")
    output, (here, after) = s.output.detach().requires_grad_(), flows(s, "dag_kl")
    balance, policy = (part(s, name, output, here, after) for name in ("balance", "policy_loss"))
    assert (gradient(balance, output) == 0).all()
    assert (gradient(policy, here) == 0).all() and (gradient(policy, after) == 0).all()
    assert gradient(policy, output).abs().sum() > 0
    assert gradcheck(lambda h, a: part(s, "balance", output.detach(), h, a), (here, after))
    with torch.no_grad():
        delta = s.objective.residual(s.batch, s.objective.log_pf(s.batch, output), Given(here, after), BETA, False)
    s.batch.prepared["advantage"] = leave_one_out(-delta, 5)
    assert torch.equal(part(s, "policy_loss", output, here, after), policy)
    # Numerically too, the advantage now being a constant. A ratio outside of the clip has no slope where it binds.
    assert gradcheck(lambda o: part(s, "policy_loss", o, here.detach(), after.detach()), (output,))


def test_a_ratio_far_outside_the_clip_has_a_finite_gradient():
    log_ratio = torch.tensor([500.0, -500.0, 500.0, -500.0], requires_grad=True)
    each, outside = clipped(log_ratio, torch.tensor([1.0, 1.0, -1.0, -1.0]), 1e-4)
    assert torch.isfinite(each).all() and outside.all() and torch.isfinite(gradient(each.sum(), log_ratio)).all()


@pytest.mark.parametrize("kind", ["nabla_db", "residual_nabla_db"])
@pytest.mark.parametrize("setting", ["corrected", "faithful"])
def test_nabla_db(kind, setting):
    s = setup(kind, setting=setting, forward_looking="base")
    here, after = flows(s, kind)
    offset = torch.zeros_like(s.output, requires_grad=True)  # s.output must stay a function of x

    def of(name, offset, here, after):
        return part(s, name, s.output + offset, here, after)

    if setting == "faithful":
        assert gradcheck(lambda o, a: of("forward_loss", o, here, a), (offset, after))
    else:
        assert gradcheck(lambda o: of("forward_loss", o, here, after.detach()), (offset,))
        assert (gradient(of("forward_loss", offset, here, after), after) == 0).all()
    assert (gradient(of("forward_loss", offset, here, after), here) == 0).all()
    assert gradcheck(lambda h: of("reverse_loss", offset.detach(), h, after), (here,))
    reverse = of("reverse_loss", offset, here, after)
    assert (gradient(reverse, offset) == 0).all() and (gradient(reverse, after) == 0).all()
    masked = gradient(reverse, here)[s.batch.terminal]
    assert (masked == 0).all() == (setting == "faithful")
    if kind == "residual_nabla_db":
        assert gradcheck(lambda a: of("terminal_loss", offset.detach(), here, a), (after,))
        assert (gradient(of("terminal_loss", offset, here, after), after)[~s.batch.terminal] == 0).all()


def test_ddpo_and_no_flow_train_the_policy_alone():
    ddpo = setup("ddpo", clip_range=0.02)
    output = ddpo.output.detach().requires_grad_()
    assert gradcheck(lambda o: ddpo.objective.loss(ddpo.batch, o, None, BETA, True)[0], (output,))
    s = setup("residual_nabla_db_no_flow")
    offset = torch.zeros_like(s.output, requires_grad=True)
    assert gradcheck(lambda o: s.objective.loss(s.batch, s.output + o, None, BETA, True)[0], (offset,))


def test_grpo_trains_the_policy_alone_and_its_kl_is_to_a_constant():
    s = setup("grpo", clip_range=0.02, reference_kl=0.3)
    output = s.output.detach().requires_grad_()
    assert gradcheck(lambda o: s.objective.loss(s.batch, o, None, BETA, True)[0], (output,))
    assert not s.batch.prepared["reference_output"].requires_grad
