"""Adjoint matching: the adjoint by autograd through the whole chain, a slow loop, and the targets of 1-D problems."""

import pytest
import torch
from exact_problem import bimodal, make_learner, pick, rollout, tilted, total_variation, train

pytestmark = pytest.mark.timeout(0)


def with_adjoints(learner, count: int, noisy: int | None = None):
    """`rollout`, trajectory by trajectory, with what `carry_back` computes."""
    batch = rollout(learner, count)
    batch = pick(batch, torch.arange(len(batch.t)).reshape(-1, count).T.flatten())
    steps = len(batch.t) // count
    x, end = (values.reshape(count, steps, *values.shape[1:]) for values in (batch.x, batch.x_next))
    states = torch.cat([x, end[:, -1:]], 1)
    at_end = batch.clean_gradient_next.reshape(end.shape)[:, -1]
    times = learner.kernel.timesteps.tolist()
    found = learner.objective.carry_back(
        learner.policy, states, times, noisy or steps, batch.embeddings[:count], at_end
    )
    batch.prepared |= {name: values.flatten(0, 1) for name, values in found.items()}
    return batch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("noisy", [5, 2])
def test_the_adjoint_is_the_gradient_through_the_frozen_chain(noisy):
    """Noise held fixed, x_0 as a function of x_k+1: states are what the policy drew, Jacobians the reference's."""
    learner = make_learner(tilted(5), "adjoint_matching", 1e-2)
    model, kernel = learner.model, learner.kernel
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.normal_(std=0.3)
    batch = with_adjoints(learner, 8, noisy)
    x = batch.x.reshape(8, 5, 1, 1, 1)
    ends = torch.cat([x[:, 1:], batch.x_next.reshape(x.shape)[:, -1:]], 1)
    times = kernel.timesteps.tolist()
    for k in range(5):
        value = start = ends[:, k].clone().requires_grad_()
        for step in range(k + 1, 5):
            t = torch.full((8,), times[step])
            advance = kernel.mean if step < noisy else kernel.without_noise
            value = advance(model.predict_reference(value, t), t, value)
            # The affine toy's Jacobian does not depend on the state: no need to put the drawn one in.
        expected = torch.autograd.grad(model.problem.rewards(value).sum(), start)[0]
        torch.testing.assert_close(batch.prepared["adjoint"].reshape(x.shape)[:, k], expected)


def test_equals_a_slow_loop_and_says_what_is_matched():
    learner = make_learner(tilted(5), "adjoint_matching", 1e-2)
    with torch.no_grad():
        for parameter in learner.model.unet.parameters():
            parameter.normal_(std=0.3)
    batch, beta = with_adjoints(learner, 8), 1.7
    output = learner.policy.output(batch)
    loss, parts = learner.objective.loss(batch, output, None, beta, False)
    total = matched = 0.0
    for i in range(len(batch.t)):
        where = batch.t[i : i + 1], batch.x[i : i + 1]
        variance = learner.kernel.variance(where[0], torch.float64).item()
        reference = learner.kernel.mean(batch.prepared["reference_output"][i : i + 1], *where).item()
        moved = learner.kernel.mean(output[i : i + 1], *where).item() - reference
        wanted = variance * beta * batch.prepared["adjoint"][i].item()
        total += (moved - wanted) ** 2 / (2 * variance) / len(batch.t)
        matched += (wanted**2 - (moved - wanted) ** 2) / (2 * variance) / len(batch.t)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert parts["matched"].item() == pytest.approx(matched, rel=1e-4, abs=1e-7)


def test_the_tilted_chain_is_reached():
    learner = make_learner(tilted(5), "adjoint_matching", 3e-2)
    before = total_variation(learner, True)
    train(learner, 150, 3e-2, lambda learner: with_adjoints(learner, 64))
    after = total_variation(learner, True)
    print(f"adjoint matching: TV {before:.3f} -> {after:.4f}")
    assert before > 0.29 and after < 0.02


@pytest.mark.slow
def test_bimodal_as_far_as_fixed_variances_allow():
    learner = make_learner(bimodal(), "adjoint_matching", 2e-3)
    before = total_variation(learner, True)
    train(learner, 600, 2e-3, lambda learner: with_adjoints(learner, 128))
    assert before > 0.4 and total_variation(learner, True) < 0.08
