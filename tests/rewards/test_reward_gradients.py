"""Reward gradients: the soft alignment reward, and the scorer's chain through the decoder."""

import numpy as np
import pytest
import torch
from brightness import Brightness, require_slope

from diffusion import base_model
from diffusion.base_model import Decoder
from diffusion.trajectory import Chunk, CleanPredictions
from models.shapes.measure import scenes
from models.shapes.world import draw
from rewards import registry
from rewards.scorer import BadReward, Scorer


def pictures(kind: str, count: int = 24) -> tuple[torch.Tensor, list[str]]:
    """True drawings under noise: nothing is at its best, where the gradient would vanish."""
    rng = np.random.default_rng(0)
    asked = scenes(kind, count)
    images = torch.from_numpy(np.stack([draw(scene, rng) for scene in asked])).permute(0, 3, 1, 2).float() / 255
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + noise).clamp(0, 1), [scene.caption() for scene in asked]


@pytest.mark.parametrize("kind", ["seen", "small", "two", "right", "any-colour", "any-shape"])
def test_soft_alignment_agrees_with_the_graded_one_and_has_its_gradient(kind):
    images, prompts = pictures(kind)
    mixed = torch.cat([images, images.roll(1, 0), images.roll(5, 3)])
    hard, soft = (registry.load(name)(mixed, prompts * 3) for name in ("shapes_alignment", "shapes_alignment_soft"))
    correlation = np.corrcoef(hard, soft.detach())[0, 1]
    print(f"{kind}: correlation {correlation:.3f}, mean difference {(soft - hard).mean():+.3f}")
    assert correlation > 0.9 and soft.min() >= 0 and soft.max() <= 1
    reward = registry.load("shapes_alignment_soft")
    assert reward.differentiable
    require_slope(reward, *pictures(kind, 6), 1e-6, rel=1e-3)


@pytest.fixture(scope="module")
def decoder():
    return Decoder("models/shapes")


def predictions(rows=(0, 0, 1, 1), steps=(1, 2, 0, 2), purpose="train") -> CleanPredictions:
    generator = torch.Generator().manual_seed(2)
    chunk = Chunk(0, purpose, 0, 0, ("a red circle", "a blue star on a white background"), (4, 9))
    latents = torch.randn(len(rows), 4, 16, 16, generator=generator).numpy()
    return CleanPredictions(chunk, 2, latents, np.array(rows), np.array(steps), 2)


@pytest.mark.parametrize("with_tiny", [False, True])
def test_each_state_has_the_gradient_of_its_own_score_to_its_clean_latent(decoder, with_tiny):
    """Whatever it was batched with; with a tiny decoder inner states are decoded together, before the images."""
    reward, clean = registry.load("shapes_alignment_soft"), predictions()
    tiny = Decoder("models/shapes/tiny_decoder", tiny=True) if with_tiny else None
    scores = Scorer(decoder, reward, gradients=True, tiny=tiny).score(clean)
    plain = Scorer(decoder, reward, tiny=tiny).score(clean)
    np.testing.assert_allclose(scores.rewards, plain.rewards, atol=1e-6)
    assert plain.gradients is None
    assert scores.gradients.shape == (4, 4, 16, 16) and scores.gradients.dtype == np.float32
    assert scores.gradient_row.tolist() == [[-1, 0, 1], [2, -1, 3]]
    for i, (row, step) in enumerate(zip(clean.row.tolist(), clean.step.tolist(), strict=True)):
        latent = torch.from_numpy(clean.latents[i : i + 1]).requires_grad_()
        images = (tiny if tiny and step < 2 else decoder)(latent)
        (alone,) = torch.autograd.grad(reward(images, [clean.chunk.prompts[row]]).sum(), latent)
        assert alone.abs().max() > 0
        found, wanted = scores.gradients[scores.gradient_row[row, step]], alone[0].numpy()
        if with_tiny:
            assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.02
        else:
            np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)


def test_evaluation_needs_no_gradients_and_training_one_that_has_them(decoder):
    scorer = Scorer(decoder, registry.load("shapes_alignment_soft"), gradients=True)
    assert scorer.score(predictions((0, 1), (2, 2), "evaluate")).gradients is None
    with pytest.raises(BadReward, match="jpeg_incompressibility is not differentiable"):
        Scorer(decoder, registry.load("jpeg_incompressibility"), gradients=True)


@pytest.mark.parametrize("factor", [1.0, torch.nn.Parameter(torch.ones(()))])
def test_a_gradient_that_does_not_reach_the_images_is_refused(decoder, factor):
    """Not even one of the reward's own weights will do."""
    detached = Brightness(lambda scores: scores.detach() * factor, differentiable=True)
    with pytest.raises(BadReward, match="no way"):
        Scorer(decoder, detached, gradients=True).score(predictions())


def test_a_class_may_say_so_when_it_is_made(decoder):
    registry.check("brightness:Brightness", None, {"differentiable": True}, [""], "nabla_db")
    late = registry.load("brightness:Brightness", differentiable=True)
    assert Scorer(decoder, late, gradients=True).score(predictions())


@pytest.mark.parametrize("reward", ["jpeg_incompressibility", "shapes_alignment", "math:sqrt"])
def test_objectives_and_rewards_that_do_not_fit_are_refused_before_anything_starts(reward):
    for kind in ("nabla_db", "residual_nabla_db", "residual_nabla_db_no_flow"):
        said = rf"objective\.kind: {kind} learns from .* {reward} is not differentiable; .*shapes_alignment_soft"
        with pytest.raises(ValueError, match=said):
            registry.check(reward, None, {}, ["a red circle"], kind)


def test_a_large_pictures_decoder_is_computed_again_on_the_way_back_with_the_same_gradient(decoder, monkeypatch):
    """And keeps less: what autograd saves of the decoder, counted by its hooks."""
    latents = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))

    def gradient(plain: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
        x, kept = latents.clone().requires_grad_(), 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        decoder.vae.disable_gradient_checkpointing()
        with monkeypatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            patch.setattr(base_model, "CHECKPOINTED", 10**9 if plain else base_model.CHECKPOINTED)
            images = decoder(x)
        images.square().sum().backward()
        return images.detach(), x.grad, kept

    assert decoder.magnification * 64 == base_model.CHECKPOINTED
    (image, slope, kept), (less_image, less_slope, less) = gradient(True), gradient(False)
    decoder.vae.disable_gradient_checkpointing()
    assert less < 0.5 * kept
    torch.testing.assert_close(less_image, image, rtol=0, atol=0)
    torch.testing.assert_close(less_slope, slope, rtol=0, atol=0)
