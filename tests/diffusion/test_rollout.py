"""Rollouts: counter-based noise, exact stored log-probabilities, one clean prediction for each needed state."""

import numpy as np
import pytest
import torch

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
