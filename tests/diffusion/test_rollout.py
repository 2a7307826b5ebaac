"""Rollouts: counter-based noise, exact stored log-probabilities, one clean prediction for each needed state."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from diffusion import lora, noise
from diffusion.base_model import BaseModel
from diffusion.rollout import Sampler, states_with_reward
from diffusion.settings import RolloutSettings
from diffusion.trajectory import Chunk


def chunk(purpose="train", ids=(0, 1, 2, 3), seed=5):
    return Chunk(0, purpose, 2, seed, ("a red circle", "a blue star", "a green ring", "a pink square"), ids)


def sampler(path: str, **settings) -> Sampler:
    model = BaseModel(path)
    model.attach_lora(rank=2, alpha=2, seed=0)
    return Sampler(model, RolloutSettings(num_steps=4, guidance=3.0, **settings))


def moved(model: BaseModel, version: int = 1, amount: float = 0.05) -> lora.Snapshot:
    """A snapshot whose LoRA does something."""
    rng = np.random.default_rng(version)
    flat = lora.snapshot(model.unet, 0).flat
    flat = (flat + amount * rng.standard_normal(flat.shape)).astype(np.float32)
    return lora.Snapshot(version, flat, lora.digest(flat))


def test_noise_is_named_by_its_use_alone():
    whole = noise.normal(3, noise.ROLLOUT, 1, range(4), 2, (4, 2, 2))
    assert np.array_equal(noise.normal(3, noise.ROLLOUT, 1, [2], 2, (4, 2, 2))[0], whole[2])
    for seed, use, epoch, step in [(4, 0, 1, 2), (3, 1, 1, 2), (3, 0, 2, 2), (3, 0, 1, 3)]:
        assert not np.array_equal(noise.normal(seed, use, epoch, [2], step, (4, 2, 2))[0], whole[2])


def test_same_chunk_same_bits_in_another_sampler_after_other_work(tiny_pipeline):
    first, second = sampler(tiny_pipeline), sampler(tiny_pipeline)
    snapshot = moved(first.model)
    expected, clean = first.sample(chunk(), snapshot)
    second.sample(chunk(ids=(9, 8, 7, 6)), moved(first.model, 3))
    again, clean_again = second.sample(chunk(), snapshot)
    assert np.array_equal(expected.states, again.states)
    assert np.array_equal(expected.log_pf, again.log_pf)
    assert np.array_equal(clean.latents, clean_again.latents)
    assert expected.adapter_sha256 == again.adapter_sha256 == snapshot.sha256
    other, _ = second.sample(chunk(seed=6), snapshot)
    assert not np.array_equal(expected.states, other.states)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_stored_log_probabilities_are_those_of_the_stored_states_and_the_receipt_sums_them(tiny_pipeline, precision):
    """In half precision too: states are rounded as they are made, and sampling goes on from the rounded state."""
    made = sampler(tiny_pipeline, state_precision=precision)
    trajectories, clean = made.sample(chunk(), moved(made.model))
    assert trajectories.states.dtype == trajectories.model_output.dtype == clean.latents.dtype == precision
    assert trajectories.log_pf.dtype == np.float32
    embeddings = made.model.embed(trajectories.chunk.prompts)
    for i, timestep in enumerate(trajectories.timesteps.tolist()):
        x, x_next = (torch.from_numpy(trajectories.states[:, j].astype(np.float32)) for j in (i, i + 1))
        t = torch.full((4,), timestep)
        with torch.no_grad():
            output, _ = made.model.predict(x, t, embeddings, 3.0)
        np.testing.assert_array_equal(output.numpy().astype(precision), trajectories.model_output[:, i])
        log_pf = made.kernel.log_pf(output, t, x, x_next, "sum")
        np.testing.assert_array_equal(log_pf.numpy(), trajectories.log_pf[:, i])
        log_pb = made.kernel.log_pb(t, x, x_next, "sum")
        np.testing.assert_allclose(trajectories.log_pb[:, i], log_pb.numpy(), rtol=1e-5)
    receipt = trajectories.receipt("here", 2.0)
    np.testing.assert_allclose(receipt.log_pf_sum, trajectories.log_pf.astype(np.float64).sum(1))
    np.testing.assert_allclose(receipt.log_pb_sum, trajectories.log_pb.astype(np.float64).sum(1))
    known = (receipt.policy_version, receipt.adapter_sha256, receipt.node, receipt.seconds)
    assert known == (1, trajectories.adapter_sha256, "here", 2.0)


def test_guidance_mixes_the_conditional_and_the_empty_prompt(tiny_pipeline):
    model = sampler(tiny_pipeline).model
    x, t, embeddings = torch.randn(2, 4, 16, 16), torch.tensor([99, 299]), model.embed(["a red ring", "a blue star"])
    with torch.no_grad():
        guided, conditional = model.predict(x, t, embeddings, 3.0)
        plain, same = model.predict(x, t, embeddings, 1.0)
        empty, _ = model.predict(x, t, model.embed(["", ""]), 1.0)
    torch.testing.assert_close(conditional, plain)
    assert torch.equal(plain, same)
    torch.testing.assert_close(guided, empty + 3 * (plain - empty), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("looking", ["base", "snapshot"])
@pytest.mark.parametrize(("prediction", "guidance"), [("conditional", 1.0), ("guided", 3.0)])
def test_clean_predictions_use_the_weights_and_guidance_they_say(tiny_pipeline, looking, prediction, guidance):
    made = sampler(tiny_pipeline, forward_looking=looking, clean_prediction=prediction)
    trajectories, clean = made.sample(chunk(), moved(made.model))
    assert np.array_equal(clean.latents[clean.step == 4], trajectories.states[:, 4])
    assert len(clean.latents) == 4 * 5
    x, t = torch.from_numpy(trajectories.states[:, 0]), torch.full((4,), int(trajectories.timesteps[0]))
    embeddings = made.model.embed(trajectories.chunk.prompts)
    with torch.no_grad():
        own = made.model.predict(x, t, embeddings, guidance)[0]
        reference = made.model.predict_reference(x, t, embeddings, guidance)
    assert not torch.allclose(own, reference)
    expected = made.kernel.clean(reference if looking == "base" else own, t, x)
    torch.testing.assert_close(torch.from_numpy(clean.latents[clean.step == 0]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("purpose", "settings", "steps"),
    [
        ("evaluate", {}, [4]),
        ("train", {"forward_looking": "none"}, [4]),
        ("train", {"forward_looking": "snapshot", "from_step": 2}, [2, 3, 4]),
        ("train", {"forward_looking": "snapshot", "image_only": True}, [4]),
    ],
)
def test_states_that_need_no_reward_are_not_scored(tiny_pipeline, purpose, settings, steps):
    made = sampler(tiny_pipeline, **settings)
    trajectories, clean = made.sample(chunk(purpose), moved(made.model))
    assert clean.step.reshape(4, -1).tolist() == [steps] * 4 and len(clean.latents) == 4 * len(steps)
    assert trajectories.selected.shape[1] == (0 if purpose == "evaluate" else 4)


def test_only_states_at_the_ends_of_selected_transitions_are_scored(tiny_pipeline):
    made = sampler(tiny_pipeline, forward_looking="none", selection="random", fraction=0.25, end=3, terminal=3)
    chosen = np.array([[True, False, False, False, False], [False, True, False, False, False]])
    needed = states_with_reward(RolloutSettings(end=3, terminal=3), chosen)
    assert [np.flatnonzero(row).tolist() for row in needed] == [[0, 1, 3, 4], [1, 2, 3, 4]]
    for scored, last in ((False, [0, 1, 4]), (True, [0, 1, 3, 4])):  # the image's reward is the trajectory's
        ends = states_with_reward(RolloutSettings(end=3, end_scored=scored), chosen[:1])
        assert np.flatnonzero(ends[0]).tolist() == last
    trajectories, clean = made.sample(chunk(), moved(made.model))
    assert trajectories.selected.shape == (4, 1) and trajectories.selected.max() < 3
    assert clean.terminal == 3 and clean.step.tolist() == [3, 4] * 4


def test_the_reference_looks_only_where_a_reward_is_needed(tiny_pipeline, monkeypatch):
    """For a third of the transitions less than all of the frozen model's passes, and the same clean predictions."""
    counted, whole = [], BaseModel.predict_reference
    monkeypatch.setattr(
        BaseModel, "predict_reference", lambda self, x, *rest: counted.append(len(x)) or whole(self, x, *rest)
    )
    some = sampler(tiny_pipeline, forward_looking="base", selection="random", fraction=0.25)
    every = sampler(tiny_pipeline, forward_looking="base")
    _, clean = some.sample(chunk(), moved(some.model))
    asked = sum(counted)
    assert asked == (clean.step < 4).sum() < 16
    _, all_clean = every.sample(chunk(), moved(every.model))
    assert sum(counted) - asked == 16
    for latent, row, step in zip(clean.latents, clean.row, clean.step, strict=True):
        (at,) = np.flatnonzero((all_clean.row == row) & (all_clean.step == step))
        np.testing.assert_allclose(latent, all_clean.latents[at], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("purpose", "asked"), [("train", True), ("evaluate", False)])
def test_the_references_densities_are_those_of_a_pass_without_the_adapter(tiny_pipeline, purpose, asked):
    """Of the same transitions, with guidance; an evaluation has them always."""
    made = sampler(tiny_pipeline, reference=asked, noise_steps=3)
    trajectories, clean = made.sample(chunk(purpose), moved(made.model))
    embeddings = made.model.embed(trajectories.chunk.prompts)
    assert trajectories.log_ref.dtype == np.float32 and clean.nats.kl.shape == clean.nats.log_ratio.shape == (4, 4)
    for i, timestep in enumerate(trajectories.timesteps.tolist()):
        if i == 3:  # without noise: no density
            for values in (trajectories.log_ref, trajectories.log_pf, clean.nats.kl, clean.nats.log_ratio):
                assert (values[:, 3] == 0).all()
            continue
        x, x_next = (torch.from_numpy(trajectories.states[:, j]) for j in (i, i + 1))
        t = torch.full((4,), timestep)
        with torch.no_grad(), made.model.without_lora():
            reference, _ = made.model.predict(x, t, embeddings, 3.0)
        with torch.no_grad():
            output, _ = made.model.predict(x, t, embeddings, 3.0)
        assert not torch.allclose(reference, output)
        log_ref = made.kernel.log_pf(reference, t, x, x_next, "sum").numpy()
        np.testing.assert_allclose(trajectories.log_ref[:, i], log_ref, rtol=1e-6)
        np.testing.assert_allclose(
            clean.nats.log_ratio[:, i], trajectories.log_pf[:, i] - trajectories.log_ref[:, i], rtol=1e-6
        )
        apart = made.kernel.mean(output, t, x) - made.kernel.mean(reference, t, x)
        variance = made.kernel.variance(t)[0].item()
        expected = apart.double().square().flatten(1).sum(1) / (2 * variance)
        np.testing.assert_allclose(clean.nats.kl[:, i], expected.numpy(), rtol=1e-4)
        assert (clean.nats.kl[:, i] > 0).all()


def test_without_being_asked_training_has_no_densities_of_the_reference(tiny_pipeline):
    made = sampler(tiny_pipeline)
    trajectories, clean = made.sample(chunk(), moved(made.model))
    assert trajectories.log_ref is None and clean.nats is None


def test_a_fresh_adapter_is_the_reference_and_needs_no_pass_of_it(tiny_pipeline, monkeypatch):
    made = sampler(tiny_pipeline, reference=True, forward_looking="none")
    moved_one, fresh = moved(made.model), lora.snapshot(made.model.unet, 0)
    asked = []
    whole = BaseModel.predict_reference
    monkeypatch.setattr(BaseModel, "predict_reference", lambda self, *rest: asked.append(1) or whole(self, *rest))
    trajectories, clean = made.sample(chunk(), fresh)
    assert np.array_equal(trajectories.log_ref, trajectories.log_pf) and not asked
    assert (clean.nats.kl == 0).all() and (clean.nats.log_ratio == 0).all()
    made.sample(chunk(), moved_one)
    assert len(asked) == 4
    made.sample(chunk(), fresh)
    assert len(asked) == 4


@pytest.mark.parametrize("purpose", ["train", "evaluate"])
def test_behind_the_noise_states_are_diffusers_ddim_with_eta_0(tiny_pipeline, purpose):
    """And up to there those of a rollout with noise in all transitions, bit by bit."""
    made, noisy = sampler(tiny_pipeline, noise_steps=2, end=2), sampler(tiny_pipeline)
    snapshot = moved(made.model)
    trajectories, clean = made.sample(chunk(purpose), snapshot)
    states = torch.from_numpy(trajectories.states)
    every, _ = noisy.sample(chunk(purpose), snapshot)
    assert np.array_equal(states[:, :3], every.states[:, :3]) and not np.array_equal(states[:, 3], every.states[:, 3])
    scheduler = DDIMScheduler.from_pretrained(f"{tiny_pipeline}/scheduler", steps_offset=1, set_alpha_to_one=False)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == trajectories.timesteps.tolist()
    embeddings = made.model.embed(trajectories.chunk.prompts)
    for i in (2, 3):
        t = scheduler.timesteps[i]
        with torch.no_grad():
            output, _ = made.model.predict(states[:, i], t.expand(4), embeddings, 3.0)
        theirs = scheduler.step(output, t, states[:, i], eta=0.0).prev_sample
        torch.testing.assert_close(states[:, i + 1], theirs, rtol=1e-4, atol=1e-5)
    assert (trajectories.log_pf[:, 2:] == 0).all() and (trajectories.log_pb[:, 2:] == 0).all()
    assert (trajectories.log_pf[:, :2] != 0).all()
    assert np.array_equal(clean.latents[clean.step == 4], trajectories.states[:, 4])


@pytest.mark.parametrize("terminal", [None, 3])
def test_a_windows_transitions_are_selected_and_its_end_is_scored_only_where_it_counts(tiny_pipeline, terminal):
    made = sampler(tiny_pipeline, first=1, end=3, terminal=terminal)
    trajectories, clean = made.sample(chunk(), moved(made.model))
    assert trajectories.selected.tolist() == [[1, 2]] * 4 and clean.terminal == (terminal or 4)
    assert clean.step.reshape(4, -1).tolist() == [[1, 2, 4] if terminal is None else [1, 2, 3, 4]] * 4
    assert trajectories.states.shape[1] == 5


def test_branches_are_their_parent_until_they_fork(tiny_pipeline):
    own = sampler(tiny_pipeline)
    snapshot = moved(own.model)
    prompts, ids = ("a red circle",) * 5, (10, 11, 12, 13, 14)
    tree = Chunk(0, "evaluate", 1, 5, prompts, ids, parents=(10, 10, 10, 13, 13), forks=(3, 0, 2, 3, 3))
    made, _ = own.sample(tree, snapshot)
    plain, _ = own.sample(Chunk(0, "evaluate", 1, 5, prompts, ids), snapshot)
    states, alone = made.states, plain.states
    for row, parent, fork in ((1, 0, 0), (2, 0, 2), (4, 3, 3)):
        assert np.array_equal(states[row, : fork + 1], states[parent, : fork + 1])
        assert not any(np.array_equal(states[row, k], states[parent, k]) for k in range(fork + 1, 5))
    assert np.abs(states[[0, 3]] - alone[[0, 3]]).max() < 1e-4  # in other batches: other last bits
    after = states[1, 1] - states[0, 1], alone[1, 1] - alone[0, 1]
    assert not np.allclose(*after)  # it begins elsewhere


def test_steps_without_noise_have_no_density_and_no_nats(tiny_pipeline):
    own = sampler(tiny_pipeline, noise_steps=2, reference=True)
    made, clean = own.sample(chunk(), moved(own.model))
    for values in (made.log_pf, made.log_pb, made.log_ref, clean.nats.log_ratio, clean.nats.kl):
        assert (values[:, 2:] == 0).all() and (values[:, :2] != 0).all()
    again = sampler(tiny_pipeline, noise_steps=2)
    other, _ = again.sample(chunk(seed=6), moved(again.model))
    assert not np.allclose(other.states, made.states)
    x, t = torch.from_numpy(made.states[:, 2]), torch.full((4,), int(made.timesteps[2]))
    output, _ = own.model.predict(x, t, own.model.embed(chunk().prompts), 3.0)
    following = own.kernel.without_noise(output.detach(), t, x)
    torch.testing.assert_close(torch.from_numpy(made.states[:, 3]), following, rtol=0, atol=1e-5)
