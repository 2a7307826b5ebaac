"""Kernel ridge regression: its gradient is that of a smooth reward, and nothing where rewards are noise."""

import pytest
import torch

from learner import kernel_ridge
from learner.kernel_ridge import KernelRidge


def drawn(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, 2, 2, generator=torch.Generator().manual_seed(seed))


def reward(x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(1).double()
    return 3 * flat[:, 0] - flat[:, 1] + torch.tanh(flat[:, 2])


def test_its_gradient_is_the_rewards():
    x = drawn(800)
    model = KernelRidge(x, ["a"] * 800, reward(x))
    assert model.explained > 0.98
    fresh = drawn(100, 1).requires_grad_()
    wanted = torch.autograd.grad(reward(fresh).sum(), fresh)[0]
    found = model.gradient(fresh.detach(), ["a"] * 100)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert (found - wanted).square().mean() < 0.02 * wanted.square().mean()


def test_its_gradient_is_that_of_the_fitted_function():
    """By central differences of sum_i a_i k(x, x_i), written down anew."""
    x = drawn(60)
    model = KernelRidge(x, ["a", "b"] * 30, reward(x))
    at = drawn(1, 2)

    def value(point: torch.Tensor) -> float:
        total = 0.0
        for i in range(60):
            one, middle = x[i].flatten().double(), x.flatten(1).double().mean(0)
            kernel = (point - middle) @ (one - middle) / model.linear
            kernel += torch.exp(-(point - one).square().sum() / model.width)
            total += float(model.coefficients[i] * kernel * (0.5 if i % 2 else 1))
        return total

    base = at.flatten().double()
    for k, found in enumerate(model.gradient(at, ["a"]).flatten().tolist()):
        step = 1e-5 * torch.eye(8, dtype=torch.float64)[k]
        assert found == pytest.approx((value(base + step) - value(base - step)) / 2e-5, rel=1e-4, abs=1e-6)


def test_noise_teaches_nothing():
    for seed in range(10):
        noise = torch.randn(100, generator=torch.Generator().manual_seed(seed + 50))
        model = KernelRidge(drawn(100, seed), ["a"] * 100, noise)
        assert model.explained == 0
        assert not model.gradient(drawn(3), ["a"] * 3).any()


def test_prompts_may_reward_the_opposite_and_differ_in_height():
    x = drawn(400)
    prompts = ["left", "right"] * 200
    sign = torch.tensor([1.0, -1.0] * 200)
    model = KernelRidge(x, prompts, sign * reward(x) + 100 * sign)
    assert model.explained > 0.9
    left, right = (model.gradient(drawn(1, 3), [prompt]).flatten()[0].item() for prompt in ("left", "right"))
    assert left == pytest.approx(3, abs=0.5) and right == pytest.approx(-3, abs=0.5)


def test_learns_from_the_newest_pictures_alone(monkeypatch):
    monkeypatch.setattr(kernel_ridge, "MOST", 100)
    x = drawn(150)
    values = reward(x)
    values[:50] *= -1
    model = KernelRidge(x, ["a"] * 150, values)
    assert model.explained > 0.9 and len(model.coefficients) == 100
    assert model.gradient(drawn(1, 3), ["a"]).flatten()[0] > 2
