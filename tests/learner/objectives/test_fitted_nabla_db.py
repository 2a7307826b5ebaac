"""Residual nabla-DB with a fitted log-flow: a slow loop, an exact flow, and the targets of 1-D problems."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact_problem import bimodal, make_learner, pick, rollout, tilted, total_variation, train

from learner.experience import Experience
from learner.fitted_flow import FittedFlow

pytestmark = pytest.mark.timeout(0)
FORWARD = "forward_fitted_nabla_db"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def by_trajectory(learner, count: int, epoch: int = 0):
    """`rollout`, trajectory by trajectory, and the same as an epoch's experience."""
    batch = rollout(learner, count)
    batch = pick(batch, torch.arange(len(batch.t)).reshape(-1, count).T.flatten())
    steps = len(batch.t) // count
    x, after = (part.reshape(count, steps, *part.shape[1:]) for part in (batch.x, batch.x_next))
    chunk = SimpleNamespace(epoch=epoch, trajectory_ids=range(count), prompts=["c"] * count)
    states, log_pf = torch.cat([x, after[:, -1:]], 1), batch.log_pf_old.reshape(count, steps)
    trajectories = SimpleNamespace(chunk=chunk, states=states.numpy(), log_pf=log_pf.numpy())
    rewards = np.full((count, learner.kernel.num_steps + 1), np.nan, np.float32)
    rewards[:, 1 : steps + 1] = batch.reward_next.reshape(count, steps)
    rewards[:, -1] = batch.reward_terminal.reshape(count, steps)[:, -1]
    row = np.arange(count)[:, None] * steps + np.arange(-1, steps)
    scores = SimpleNamespace(rewards=rewards, gradients=batch.clean_gradient_next.numpy(), gradient_row=row)
    return batch, Experience(trajectories, scores)  # type: ignore[arg-type]


def fitted(count: int, kept: int = 0):
    """Batches whose log-flow is fitted to their own trajectories and to those of `kept` earlier ones."""
    earlier: list[Experience] = []

    def draw(learner):
        batch, experience = by_trajectory(learner, count, len(earlier))
        beta = learner.config.objective.beta
        FittedFlow(learner.policy, learner.kernel, learner.config).prepare([experience], earlier[-kept:], beta, 7)
        if kept:
            earlier.append(experience)
        tensors = {name: torch.from_numpy(values) for name, values in experience.prepared.items()}
        batch.prepared |= {name: values.flatten(0, 1) for name, values in tensors.items()}
        return batch

    return draw


def pick_one(batch, i: int):
    one = pick(batch, torch.tensor([i]))
    return replace(one, prepared={name: value[i : i + 1] for name, value in batch.prepared.items()})


def stirred():
    learner = make_learner(tilted(5), "fitted_nabla_db", 1e-2)
    with torch.no_grad():
        for parameter in learner.model.unet.parameters():
            parameter.normal_(std=0.3)
    return learner


def test_equals_a_slow_loop():
    learner, beta = stirred(), 1.7
    batch = fitted(8)(learner)
    loss, parts = learner.objective.loss(batch, learner.policy.output(batch), None, beta, False)
    total = matched = 0.0
    for i in range(len(batch.t)):
        where = batch.t[i : i + 1], batch.x[i : i + 1]
        variance = learner.kernel.variance(where[0], torch.float64).item()
        reference = learner.kernel.mean(learner.model.predict_reference(where[1], where[0]), *where).item()
        moved = learner.kernel.mean(learner.model.predict(where[1], where[0])[0], *where).item() - reference
        wanted = variance * batch.prepared["log_flow_gradient"][i].item()
        total += (moved - wanted) ** 2 / (2 * variance) / len(batch.t)
        matched += (wanted**2 - (moved - wanted) ** 2) / (2 * variance) / len(batch.t)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert parts["matched"].item() == pytest.approx(matched, rel=1e-4, abs=1e-7)


def test_what_is_regressed_on_is_still_to_come_and_known_at_a_reached_target(monkeypatch):
    """Values by a loop over trajectories; and as the policy that samples is the tilted chain itself, whose log-flow is
    linear, the regression leaves nothing, and its gradient is the policy's own shift."""
    seen = []
    original = FittedFlow._fit

    def watched(self, experiences, beta):
        found = original(self, experiences, beta)
        seen.append((experiences, found))
        return found

    monkeypatch.setattr(FittedFlow, "_fit", watched)
    learner = make_learner(tilted(5), "fitted_nabla_db", 1e-2)
    train(learner, 120, 5e-2, fitted(64))
    (experience,), fits = seen[-1]
    spent = experience.prepared["spent"]
    for i in range(3):
        for k in range(5):
            x, after = (torch.from_numpy(experience.trajectories.states[i : i + 1, j]) for j in (k, k + 1))
            t = learner.kernel.timesteps[k : k + 1]
            reference = learner.kernel.log_pf(learner.model.predict_reference(x, t), t, x, after, "sum").item()
            assert spent[i, k] == pytest.approx(experience.trajectories.log_pf[i, k] - reference, abs=1e-5)
    behind = np.stack([spent[:, k + 1 :].sum(1) for k in range(5)], 1)
    values = experience.scores.rewards[:, -1:] - behind
    gained = [values[:, k].var() for k in range(5)]
    assert min(fit.explained for fit in fits) > 0.95 and min(gained) > 0.01


def test_weights_are_the_targets_density_over_the_policys_within_a_prompt():
    learner, beta = stirred(), 1.7
    _, experience = by_trajectory(learner, 12)
    experience.trajectories.chunk.prompts = ["a", "b"] * 6
    experience.scores.rewards[0, -1] += 20  # alone it would count as 6
    flow = FittedFlow(learner.policy, learner.kernel, learner.config)
    flow.prepare([experience], [], beta, 6)
    left = beta * experience.scores.rewards[:, -1].astype(float) - experience.prepared["spent"].sum(1)
    for group in (slice(0, None, 2), slice(1, None, 2)):
        wanted = np.exp(left[group]) / np.exp(left[group]).mean()
        for column in experience.prepared["target_weight"][group].T:
            np.testing.assert_allclose(column, wanted.clip(max=5), rtol=1e-4)


def test_weighted_the_loss_is_of_the_targets_trajectories():
    learner = stirred()
    batch = fitted(8)(learner)
    output = learner.policy.output(batch)
    weights = batch.prepared["target_weight"]
    each = [
        learner.objective.loss(pick_one(batch, i), output[i : i + 1], None, 1.0, False)[0] for i in range(len(weights))
    ]
    weighted = make_learner(tilted(5), "fitted_nabla_db", 1e-2, trajectory_weight="target")
    loss, _ = weighted.objective.loss(batch, output, None, 1.0, False)
    assert loss.item() == pytest.approx((torch.stack(each) * weights).mean().item(), rel=1e-5)
    assert weights.std() > 0.1


def test_a_fit_that_may_be_chance_wants_the_reference():
    learner = make_learner(tilted(5), "fitted_nabla_db", 1e-2)
    _, experience = by_trajectory(learner, 16)
    experience.scores.rewards[:] = np.random.default_rng(0).normal(size=(16, 6))
    told = FittedFlow(learner.policy, learner.kernel, learner.config).prepare([experience], [], 1.0, 16)
    assert told == {"flow_explained_first": 0.0, "flow_explained_last": 0.0}
    assert not experience.prepared["log_flow_gradient"].any()


@pytest.mark.parametrize(
    ("kind", "kept", "weight"),
    [("fitted_nabla_db", 0, "uniform"), ("fitted_nabla_db", 1, "target"), (FORWARD, 0, "uniform")],
)
def test_the_tilted_chain_is_reached(kind, kept, weight):
    learner = make_learner(tilted(5), kind, 5e-2, trajectory_weight=weight)
    before = total_variation(learner, True)
    train(learner, 60, 5e-2, fitted(64, kept))
    after = total_variation(learner, True)
    print(f"{kind}, {kept} kept: TV {before:.3f} -> {after:.4f}")
    assert before > 0.29 and after < 0.02


def test_looking_forward_the_reward_of_the_clean_prediction_is_all_there_is(monkeypatch):
    """Tilted chain: log F is linear, and so is r(xhat): nothing is left to the regression, whose gradient is then zero,
    and the slope times the reward's gradient is log F's own."""
    fits = []
    original = FittedFlow._fit
    monkeypatch.setattr(FittedFlow, "_fit", lambda *given: fits.extend(original(*given)) or fits[-5:])
    learner = make_learner(tilted(5), FORWARD, 3e-2, beta=2.0)
    draw = fitted(512)
    forward = draw(learner).prepared["log_flow_gradient"]
    assert [fit.explained for fit in fits] == pytest.approx([0] * 5, abs=0.01)
    assert fits[-1].slope == pytest.approx(2, abs=1e-3)  # beta: x_0 is the image
    abar = learner.kernel.abar(learner.kernel.timesteps, torch.float64)
    wanted = torch.cat([abar[1:], torch.ones(1, dtype=torch.float64)]).sqrt()  # d xhat / d x, the base being N(0, 1)
    torch.testing.assert_close(forward.reshape(-1, 5).mean(0).double(), 2 * wanted, rtol=0.3, atol=0.02)


def test_a_window_is_exact_with_noise_in_it_alone():
    learner = make_learner(tilted(5), "fitted_nabla_db", 5e-2, {"noise": "window"}, window=(0, 2))
    train(learner, 60, 5e-2, fitted(64))
    assert total_variation(learner, True) < 0.02


@pytest.mark.slow
def test_bimodal_as_far_as_fixed_variances_allow():
    learner = make_learner(bimodal(), "fitted_nabla_db", 2e-3)
    before = total_variation(learner, True)
    train(learner, 600, 2e-3, fitted(128))
    found = total_variation(learner, True)
    print(f"fitted nabla-DB, bimodal: TV {before:.3f} -> {found:.4f}")
    assert before > 0.4 and found < 0.08
