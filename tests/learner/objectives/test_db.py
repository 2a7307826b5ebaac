"""The pieces of DAG-DB's loss: see test_slow_loops.py for the whole of it against a loop."""

from types import SimpleNamespace

import pytest
import torch

from diffusion import lora
from learner import build
from learner.config import load_config
from learner.config.sections import Objective as Settings
from learner.objectives import db
from learner.objectives.base import Objective, anneal
from learner.prompts import read_prompts
from learner.protocol.chunks import training_chunks


def penalty(delta: torch.Tensor, kind: str, width: float = 1.0) -> torch.Tensor:
    return db.DagDB(Settings(penalty=kind, huber_width=width), None).penalty(delta)


def test_penalty_properties():
    delta = torch.linspace(-4, 4, 81, dtype=torch.float64)
    for kind in ("squared", "huber"):
        g = penalty(delta, kind)
        assert (g >= 0).all() and penalty(torch.zeros(1), kind).item() == 0
        torch.testing.assert_close(g, g.flip(0))
    small = delta[delta.abs() <= 1]
    torch.testing.assert_close(penalty(small, "huber"), small.square())
    large = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert torch.diff(penalty(large, "huber", 0.5)).item() == pytest.approx(2 * 0.5)


def test_next_flow_gradient_only_when_faithful_and_never_at_the_end():
    f_next = torch.ones(2, requires_grad=True)
    terminal = torch.tensor([False, True])
    for detach, expected in ((False, [1.0, 0.0]), (True, [0.0, 0.0])):
        value = db.next_log_flow(f_next, torch.zeros(2), torch.tensor([5.0, 6.0]), terminal, detach)
        assert value[1].item() == 6.0
        gradient = torch.autograd.grad(value.sum(), f_next)[0] if value.requires_grad else torch.zeros(2)
        assert gradient.tolist() == expected


def test_annealing_is_linear_over_the_first_half_and_decay_fades_towards_the_noise():
    assert [anneal(100, epoch, 8, 0.5) for epoch in range(6)] == [0, 25, 50, 75, 100, 100]
    assert anneal(100, 0, 8, 0.0) == 100
    abar = torch.tensor([0.01, 0.25, 1.0])

    def gamma(decay: str) -> torch.Tensor:
        kernel = SimpleNamespace(abar=lambda t, dtype: abar[t].to(dtype))
        return Objective(Settings(forward_looking_decay=decay), kernel).gamma(torch.arange(3), torch.float32)

    assert gamma("none").tolist() == [1, 1, 1]
    torch.testing.assert_close(gamma("sqrt_abar"), torch.tensor([0.1, 0.5, 1.0]))
    assert torch.equal(gamma("abar"), abar)


def test_under_sum_what_no_network_learns_is_known_in_closed_form():
    """Rollouts of the embedded model: without a flow network the residuals of the noisy steps vary by |x|^2 and are off
    by hundreds to thousands of nats, as the volume of every step is missing."""
    config = load_config(overrides=["objective.log_prob_reduction=sum", "sampler.chunk_size=16"])
    sampler = build.build_sampler(config)
    chunk = training_chunks(config, read_prompts(config.prompts.path), 0)[0]
    made, _ = sampler.sample(chunk, lora.snapshot(sampler.model.unet, 0))
    times = torch.tensor([*made.timesteps, 0])
    ahead = torch.from_numpy(made.log_pf - made.log_pb)
    for last in ("train", "skip"):
        objective = db.DagDB(Settings(log_prob_reduction="sum", last_transition=last), sampler.kernel)
        end = len(times) - 1 - (last == "skip")
        known = [objective.known(torch.from_numpy(made.states[:, i]), times[i].expand(16)) for i in range(end)]
        with_known = ahead[:, :end] + torch.stack([*known], 1) - torch.stack([*known[1:], torch.zeros(16)], 1)
        explained = 1 - with_known.var(0) / ahead[:, :end].var(0)
        assert (explained[:3] > torch.tensor([0.99, 0.98, 0.9])).all()
        print(last, explained, with_known.mean(0), with_known.std(0))
        assert (with_known.mean(0).abs() < 60).all() and ahead[:, :end].mean(0).max() > 500
