"""Natural steps: rows are single gradients, T-problems in few updates, no learning rate, ranks agree."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from exact_problem import Problem, Quadratic, ToyModel, gaussian, tilted, total_variation
from test_process_group import Ranks
from torch import Tensor, nn

from diffusion.base_model import BaseModel
from diffusion.rollout import Sampler
from diffusion.trajectory import Chunk, Scores
from learner import process_group
from learner.config import Config, ConfigError, load_config
from learner.natural import Natural, System
from learner.objectives.needs import NEEDS
from learner.rows import Rows, trained
from learner.update import Learner

BATCH = 128


class Steps(nn.Module):
    """An affine map a step, as the B matrix of a LoRA has it: linear in its features."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.steps = problem.steps
        self.lora_B = nn.Linear(2 * (problem.steps + 1), 1, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        place = nn.functional.one_hot(t, self.steps + 1).to(x.dtype)
        features = torch.cat([place, place * x.reshape(-1, 1)], 1)
        return self.lora_B(features).reshape(x.shape)


class Linear(ToyModel):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.unet = Steps(problem)

    def embed(self, prompts):
        return torch.zeros(len(prompts), 1, 1)


def make(problem: Problem, kind: str, **learner) -> tuple[Learner, Sampler]:
    objective = {"kind": kind, "log_prob_reduction": "sum", "beta": 1.0, "regulariser": 0.0, "anneal_fraction": 0.0}
    fits = 100 if NEEDS[kind].flow else 0
    config = Config.model_validate({
        "objective": {**objective, "forward_looking": "none", "reward_offset": 0.0},
        "sampler": {"steps": problem.steps, "guidance": 1.0, "chunk_size": 32}, "prompts": {"per_prompt": 4},
        "learner": {"optimizer": "natural", "micro_batch": 512, **learner},
        "flow": {"learning_rate": 0.1, "fit_steps": fits, "batch": 256},
        "train": {"trajectories": BATCH, "updates_per_epoch": 1},
    })  # fmt: skip
    flow = Quadratic(problem) if config.needs.flow else None
    model = Linear(problem)
    made = Learner(model, flow, config)  # type: ignore[arg-type]
    return made, Sampler(model, config.rollout_settings())  # type: ignore[arg-type]


def epoch_of(problem: Problem, learner: Learner, sampler: Sampler, number: int, prompts: str = "a"):
    """Prompts, of a letter each, take turns by groups of four."""
    scored = []
    for index in range(BATCH // 32):
        ids = tuple(range(32 * index, 32 * index + 32))
        chunk = Chunk(index, "train", number, 0, tuple(prompts[i // 4 % len(prompts)] for i in ids), ids)
        trajectories, _ = sampler.sample(chunk, learner.published)
        rewards = np.full((32, problem.steps + 1), np.nan, np.float32)
        rewards[:, -1] = problem.rewards(torch.from_numpy(trajectories.states[:, -1])).numpy()
        scored.append((trajectories, Scores(chunk, rewards)))
    return scored


def trained_for(problem: Problem, kind: str, epochs: int, residual: bool, **settings):
    learner, sampler = make(problem, kind, **settings)
    before, rows = total_variation(learner, residual), []
    for number in range(epochs):
        training = learner.train_epoch(number, 1.0, [epoch_of(problem, learner, sampler, number)])
        learner.publish(number + 1)
        rows.append(training.metrics)
    after = total_variation(learner, residual)
    print(f"{kind} {settings}: TV {before:.3f} -> {after:.4f} in {epochs} updates")
    return before, after, rows


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_rows_are_the_gradients_of_single_transitions(tiny_pipeline):
    model = BaseModel(tiny_pipeline)
    model.attach_lora(2, 2, 0)
    with torch.no_grad():
        for _, parameter in trained(model.unet):
            parameter.normal_(std=0.1)
    kernel = model.kernel(4)
    x, after = torch.randn(2, 3, *model.latent_shape).unbind(0)
    t, embeddings = kernel.timesteps[:3], model.embed(["a", "b", "c"])
    for guidance in (1.0, 3.0):
        watcher = Rows(model.unet)
        with watcher.watched():
            values = kernel.log_pf(model.predict(x, t, embeddings, guidance)[0], t, x, after, "sum")
            rows = torch.cat(watcher.of(values), 1)
        values = kernel.log_pf(model.predict(x, t, embeddings, guidance)[0], t, x, after, "sum")
        for value, row in zip(values, rows, strict=True):
            single = torch.autograd.grad(value, [p for _, p in trained(model.unet)], retain_graph=True)
            expected = torch.cat([part.flatten() for part in single])
            assert (row - expected).norm() < 1e-5 * expected.norm()
    assert not any(module._forward_hooks for module in model.unet.modules())


@pytest.mark.parametrize(("kind", "epochs"), [("rtb", 6), ("rsub", 6), ("rdb", 6)])
def test_a_linear_gaussian_problem_is_solved_in_a_few_updates(kind, epochs):
    before, after, rows = trained_for(tilted(5), kind, epochs, True)
    assert before > 0.29 and after < 0.02
    assert any(row["length"] and row["explained"] > 0.1 for row in rows)


@pytest.mark.parametrize("kind", ["tb", pytest.param("dag_db", marks=pytest.mark.long)])
def test_the_target_of_dag_is_reached(kind):
    before, after, _ = trained_for(gaussian(5), kind, 12, False)
    assert before > 0.6 and after < 0.02


def test_earlier_epochs_serve_under_the_present_weights():
    _, after, rows = trained_for(tilted(5), "rtb", 6, True, natural_epochs=4)
    assert after < 0.02 and math.isfinite(rows[-1]["residual_variance"])


def test_rewards_that_nothing_explains_move_nothing():
    problem = tilted(5)
    learner, sampler = make(problem, "rtb")
    rng, scored = np.random.default_rng(0), []
    for trajectories, scores in epoch_of(problem, learner, sampler, 0):
        noise = scores.rewards.copy()
        noise[:, -1] = rng.normal(size=len(noise))
        scored.append((trajectories, replace(scores, rewards=noise)))
    before = learner.published.sha256
    training = learner.train_epoch(0, 1.0, [scored])
    assert training.metrics["explained"] == training.metrics["length"] == 0
    assert learner.publish(1).sha256 == before  # only such a step may publish what was


def test_two_prompts_have_a_constant_each():
    """The second prompt's rewards are 50 higher, which is log Z alone."""
    problem = tilted(5)
    learner, sampler = make(problem, "rtb")
    for number in range(6):
        scored = []
        for trajectories, scores in epoch_of(problem, learner, sampler, number, "ab"):
            higher = np.array([50.0 * (prompt == "b") for prompt in trajectories.chunk.prompts], np.float32)
            scored.append((trajectories, replace(scores, rewards=scores.rewards + higher[:, None])))
        learner.train_epoch(number, 1.0, [scored])
        learner.publish(number + 1)
    assert total_variation(learner, True) < 0.02


def _rank(rank: int, count: int, address: str, problem_steps: int, queue) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    process_group.join(address, rank, count, 60, whole_gpu=False)
    problem = tilted(problem_steps)
    learner, sampler = make(problem, "rtb")
    scored = epoch_of(problem, learner, sampler, 0, "ab")
    metrics = learner.train_epoch(0, 1.0, [scored[rank::count]]).metrics
    queue.put((rank, learner.publish(1).flat, metrics))
    torch.distributed.destroy_process_group()


def test_two_ranks_take_the_step_of_one():
    problem = tilted(5)
    learner, sampler = make(problem, "rtb")
    metrics = learner.train_epoch(0, 1.0, [epoch_of(problem, learner, sampler, 0, "ab")]).metrics
    alone = learner.publish(1).flat
    with Ranks(_rank, 2, 5, needs="learner.update") as ranks:
        shared = ranks.answers(2, seconds=120)
    for _, flat, found in shared:
        np.testing.assert_allclose(flat, alone, rtol=2e-3, atol=1e-4)
        assert found["length"] == metrics["length"] > 0
        assert found["explained"] == pytest.approx(metrics["explained"], rel=1e-4)
    assert np.array_equal(shared[0][1], shared[1][1])


@pytest.mark.parametrize(("changes", "said"), [
    (("objective.kind=ddpo",), "ddpo is no sum of squares for natural"),
    (("objective.kind=rsub", "flow.fit_steps=0"), "flow.fit_steps: with learner.optimizer=natural"),
    (("train.replay_updates=1",), "natural steps use earlier epochs by learner.natural_epochs"),
    (("objective.regulariser=1",), "natural solves the plain squares"),
    (("prompts.per_prompt=16", "sampler.chunk_size=16", "train.trajectories=64"), "make 64 at least 128"),
    (("objective.window=[0, 3]", "objective.later_kl=1"), "natural steps have none"),
])  # fmt: skip
def test_what_natural_steps_cannot_do_is_refused(changes, said):
    plain = ("objective.kind=rtb", "learner.optimizer=natural", "flow.fit_steps=0", "flow.warmup_steps=0",
             "objective.last_transition=train", "objective.regulariser=0", "objective.penalty=squared",
             "objective.transition_weight=uniform", "train.trajectories=512")  # fmt: skip
    load_config(overrides=list(plain))
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(overrides=[*plain, *changes])


def bare(free_constant: bool) -> Natural:
    """Over two tensors and no model."""
    natural = object.__new__(Natural)
    natural.sizes, natural.rank = [30, 40], 0
    natural.parameters = [nn.Parameter(torch.zeros(size)) for size in natural.sizes]
    natural.objective, natural.config = SimpleNamespace(needs=SimpleNamespace(free_constant=free_constant)), Config()
    return natural


def test_a_prompt_and_epoch_share_a_constant_where_there_is_one():
    names = [(0, 0, 0, "a"), (0, 1, 0, "b"), (1, 0, 0, "a"), (0, 2, 0, "a")]
    assert bare(True)._groups(names).tolist() == [0, 1, 2, 0]
    assert bare(False)._groups(names).tolist() == [-1] * 4


def test_the_direction_is_the_solutions_whatever_the_scales_of_the_tensors():
    """Residuals move along it as the Gram matrix of scaled rows says: here the second tensor's rows are 30 times the
    first's, whose alone the residuals are."""
    rows = torch.randn(50, 70) * torch.cat([torch.ones(30), torch.full((40,), 30.0)])
    errors = rows[:, :5].sum(1)
    system = System([(0, i, 0, "a") for i in range(50)], errors, torch.ones(50), rows.to(torch.bfloat16))
    (direction,), solution = bare(False)._solve(system)
    assert solution.explained > 0.3
    left = errors + rows @ direction
    of_first, of_second = rows[:, :30] @ direction[:30], rows[:, 30:] @ direction[30:]
    assert left.norm() < 0.5 * errors.norm() and of_second.norm() < of_first.norm()
