"""DDPO as usually coded is the project's own: loss and gradients in float64, and what its loop takes from an epoch."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from benchmarks.usual import Rollouts
from benchmarks.usual_ddpo import UsualDDPO
from diffusion.kernels import DDIMKernel
from learner.config import load_config
from learner.objectives.base import Policy, Transitions
from learner.objectives.ddpo import DDPO

STEPS, COUNT, SHAPE = 5, 6, (2, 3, 2)
PROMPTS = ("a", "b", "a", "a", "b", "a")
close = {"rel": 1e-10, "abs": 1e-14}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_weight = nn.Parameter(torch.tensor([0.7, 0.3, 0.2], dtype=torch.float64))


class Model:
    """In float64, as the embedded one is not."""

    device, latent_shape = torch.device("cpu"), SHAPE

    def __init__(self, prediction: str) -> None:
        self.unet = Network()
        self.scheduler = DDIMScheduler(
            num_train_timesteps=50, beta_schedule="linear", beta_start=0.02, beta_end=0.2, clip_sample=False,
            timestep_spacing="trailing", steps_offset=1, set_alpha_to_one=False, prediction_type=prediction,
        )  # fmt: skip

    def kernel(self, steps, eta, grid):
        return DDIMKernel.from_scheduler(self.scheduler, steps, eta, grid)

    def embed(self, prompts):
        return torch.tensor([[float(ord(prompt[0]) % 5)] for prompt in prompts], dtype=torch.float64)

    def predict(self, x, t, embeddings, guidance):
        a, b, c = self.unet.lora_weight
        output = a * x + b * torch.sin(guidance * x) + c * embeddings.reshape(-1, 1, 1, 1)
        return output, output


def judge(images, prompts):
    return images.mean((1, 2, 3)) * 3


@pytest.fixture(params=["v_prediction", "epsilon"])
def model(request) -> Model:
    return Model(request.param)


def loop_of(model: Model, *overrides: str) -> UsualDDPO:
    settings = [f"sampler.steps={STEPS}", "objective.kind=ddpo", "learner.micro_batch=4", "objective.clip_range=0.05"]
    config = load_config({}, [*settings, *overrides])
    return UsualDDPO(model, SimpleNamespace(decoder=lambda latents: latents, reward=judge), config)


def made(model: Model, loop: UsualDDPO) -> Rollouts:
    """A rollout in float64, whose ratios are not 1, some of them outside of the clip."""
    draw = loop._noise
    loop._noise = lambda count: draw(count).double()
    rollouts = loop.sample(PROMPTS)
    with torch.no_grad():
        model.unet.lora_weight.add_(torch.tensor([0.02, -0.03, 0.05], dtype=torch.float64))
    return rollouts


def of_the_project(model: Model, loop: UsualDDPO, rollouts: Rollouts) -> tuple[torch.Tensor, float]:
    """Loss of the transitions that the config trains, and the share of ratios outside of the clip."""
    kernel = model.kernel(STEPS, 1.0, "ddim")
    objective, end = DDPO(loop.config.objective, kernel), loop.config.objective.span(STEPS)[1]
    step, row = torch.arange(end).repeat(COUNT), torch.arange(COUNT).repeat_interleave(end)
    times, nothing = torch.tensor([*kernel.timesteps.tolist(), 0]), torch.zeros(len(row))
    embeddings = model.embed(PROMPTS)[row]
    batch = Transitions(
        x=rollouts.states[row, step], x_next=rollouts.states[row, step + 1], t=times[step], t_next=times[step + 1],
        trajectory_id=row, embeddings=embeddings, reward=nothing, reward_next=nothing, reward_terminal=nothing,
        terminal=step + 1 == STEPS, log_pf_old=rollouts.log_probs[row, step] * rollouts.states[0, 0].numel(),
        output_old=rollouts.outputs[row, step],
    )  # fmt: skip
    objective.begin_epoch(range(COUNT), PROMPTS, rollouts.rewards.tolist(), None, 1.0)
    batch.prepared |= objective.prepare(Policy(model, loop.config.sampler.guidance), batch)
    output = model.predict(batch.x, batch.t, embeddings, loop.config.sampler.guidance)[0]
    loss, parts = objective.loss(batch, output, None, 1.0, False)
    return loss, parts["clipped"].item()


@pytest.mark.parametrize("more", [(), ("objective.transition_weight=variance", "objective.last_transition=skip")])
def test_loss_and_gradients_are_those_of_the_project(model, more):
    loop = loop_of(model, *more)
    rollouts = made(model, loop)
    loss, outside = of_the_project(model, loop, rollouts)
    loss.backward()
    wanted = model.unet.lora_weight.grad.clone()
    model.unet.zero_grad()
    assert loop.accumulate(loop.compared(rollouts), 1.0) == pytest.approx(loss.item(), **close)
    assert model.unet.lora_weight.grad.tolist() == pytest.approx(wanted.tolist(), **close)
    assert 0.05 < outside < 0.95 and wanted.abs().min() > 1e-4


def test_an_update_is_a_step_on_each_part_with_advantages_of_the_whole_epoch(model, monkeypatch):
    loop = loop_of(model)
    rollouts = made(model, loop)
    parts = loop.compared(rollouts).split(2)
    before, seen = model.unet.lora_weight.detach().clone(), []
    inner = loop.accumulate
    monkeypatch.setattr(loop, "accumulate", lambda part, beta: seen.append(part.rewards) or inner(part, beta))
    assert len(loop.train(rollouts, 1.0, 2)) == 2
    assert [each.tolist() for each in seen] == [part.rewards.tolist() for part in parts]
    assert not torch.equal(before, model.unet.lora_weight)
    assert torch.cat(seen).mean().abs() < 1e-9


def test_advantages_are_bounded(model):
    rewards = torch.tensor([0.0] * 60 + [100.0], dtype=torch.float64)
    rollouts = Rollouts(("a",) * 61, torch.zeros(61, 1, 1, dtype=torch.float64), None, rewards, None)
    compared = UsualDDPO.compared(rollouts).rewards
    assert compared.max() == 5 and compared[0] == compared[59] < 0
