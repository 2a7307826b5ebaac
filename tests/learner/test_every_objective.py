"""For each objective: restarts are bitwise, micro-batches and ranks do not matter, gradients are the chain's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scored_epochs import scored_epoch, stir
from test_process_group import Ranks

from diffusion.base_model import Decoder
from learner import build, process_group, state
from learner.config import Config, ConfigError, load_config
from learner.experience import Experience
from learner.objectives.by_name import OBJECTIVES, describe
from learner.objectives.needs import NEEDS
from learner.run import main
from learner.update import Learner
from rewards import registry

BETA = 5.0
OTHERS = tuple(kind for kind in OBJECTIVES if kind != "dag_db")
KINDS = ["dag_db", *(pytest.param(kind, marks=pytest.mark.long) for kind in OTHERS)]
GRADIENTS = [kind for kind in OBJECTIVES if NEEDS[kind].reward_gradients]


@pytest.mark.long
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_run_that_was_stopped_goes_on_bitwise(kind, small_settings, settings_of, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle at the right\n")  # 16 rewards of a prompt after two epochs
    settings = [
        *small_settings, *settings_of(kind), "run.runner=inprocess", "evaluation.images=0",
        f"prompts.path={tmp_path / 'prompts.txt'}",
    ]  # fmt: skip
    for folder, epochs in (("unbroken", 3), ("stopped", 2), ("stopped", 3)):
        assert main([*settings, f"train.epochs={epochs}", f"run.dir={tmp_path / folder}"]) == 0
    latest = [tmp_path / run / "checkpoints/latest" for run in ("unbroken", "stopped")]
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        unbroken, stopped = ((folder / "lora" / name).read_bytes() for folder in latest)
        assert unbroken == stopped
    unbroken, stopped = (state.parse((folder / state.LEARNER_FILE).read_bytes()) for folder in latest)
    assert ("flow" in unbroken) == (NEEDS[kind].flow is not None)
    if NEEDS[kind].flow:
        torch.testing.assert_close(unbroken["flow"], stopped["flow"], rtol=0, atol=0)


def new_learner(config: Config, version: int = 0) -> Learner:
    learner = build.build_learner(config)
    stir(learner)
    if version:
        learner.publish(version)
    return learner


def gradients(learner: Learner, scored) -> torch.Tensor:
    """What one update of this rank's `scored` hands to the optimizers, flattened."""
    experiences = [Experience(*pair) for pair in scored]
    learner._prepare(experiences, BETA)
    if learner.config.objective.kind == "dag_kl":  # ratios away from 1, some clipped
        for each in experiences:
            shift = np.random.default_rng(each.trajectories.chunk.index).normal(0, 0.05, each.trajectories.log_pf.shape)
            moved = each.trajectories.log_pf + shift.astype(np.float32)
            each.trajectories = replace(each.trajectories, log_pf=moved)
    handed: list[torch.Tensor] = []
    learner._step = lambda optimizer, parameters: handed.extend(p.grad.clone() for p in parameters) or 0.0  # type: ignore
    batches = (batch for each in experiences for batch in learner._micro_batches(each, BETA))
    learner.update(batches, sum(map(len, experiences)), BETA)
    del learner._step
    for parameter in [*learner.policy_parameters, *learner.flow_parameters]:
        parameter.grad = None
    return torch.cat([gradient.flatten() for gradient in handed])


@pytest.fixture
def configured(small_config, settings_of):
    def make(kind: str, *more: str) -> Config:
        return small_config(*settings_of(kind), "flow.fit_steps=0", "flow.warmup_steps=0", *more)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_do_not_change_the_gradient(kind, configured):
    """For dag_kl these are smaller than a group, a group and a half, and the whole."""
    learner = new_learner(configured(kind, "learner.micro_batch=12"), version=1)
    scored = scored_epoch(learner.config, learner.published)
    whole = gradients(learner, scored)
    assert whole.abs().max() > 0
    for size in (2, 9):
        smaller = new_learner(configured(kind, f"learner.micro_batch={size}"), version=1)
        # Convolution algorithms differ by batch size, so float accuracy relative to the largest entry.
        close = {"rtol": 1e-3, "atol": (2e-4 if kind == "dag_db" else 3e-4) * whole.abs().max().item()}
        torch.testing.assert_close(gradients(smaller, scored), whole, **close)


def _rank(rank: int, count: int, address: str, configs: list[Config], epochs, queue) -> None:
    torch.set_num_threads(1)
    process_group.join(address, rank, count, 60, whole_gpu=False)
    for config, epoch in zip(configs, epochs, strict=True):
        queue.put((config.objective.kind, rank, gradients(new_learner(config), epoch[rank::count]).numpy()))
    torch.distributed.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "kinds"),
    [(2, tuple(OBJECTIVES)), pytest.param(4, ("dag_db", "dag_kl", "nabla_db"), marks=pytest.mark.slow)],
)
def test_ranks_agree_with_one_on_every_objectives_gradient(count, kinds, configured):
    configs = [configured(kind, "sampler.chunk_size=2") for kind in kinds]
    alone, epochs = {}, []
    for config in configs:
        learner = new_learner(config, version=1)
        epochs.append(scored_epoch(config, learner.published))
        alone[config.objective.kind] = gradients(learner, epochs[-1]).numpy()
    with Ranks(_rank, count, configs, epochs, needs="learner.build") as ranks:
        shared = {(kind, rank): gradient for kind, rank, gradient in ranks.answers(count * len(configs), seconds=180)}
    for kind, one in alone.items():
        assert all(np.array_equal(shared[kind, 0], shared[kind, rank]) for rank in range(count))
        norm, difference = np.linalg.norm(one), np.abs(shared[kind, 0] - one).max()
        print(f"{kind}: {count} ranks against 1: largest gradient difference {difference / norm:.1e} of the norm")
        assert 0 < difference < 1e-5 * (np.abs(one).max() if kind == "dag_db" else norm)


@pytest.mark.parametrize("looking", ["base", *(pytest.param(x, marks=pytest.mark.long) for x in ("snapshot", "none"))])
def test_the_gradient_of_the_value_is_the_whole_chains(looking, configured):
    """Scorer's factor times learner's factor = autograd through U-Net with guidance, decoder and reward at once. With
    `none` only the clean prediction that counts as the end has one. The reward has kinks (a pixel's share of ink stops
    at 0 and 1): a pixel at one may fall on either side, by the last bit of a batch, so the whole field is compared, not
    each number."""
    learner = new_learner(configured("residual_nabla_db", f"objective.forward_looking={looking}"), version=1)
    chunk = Experience(*scored_epoch(learner.config, learner.published)[0])
    batch = chunk.gather(np.arange(len(chunk)), learner.model, learner.config)
    batch.prepared |= learner.objective.prepare(learner.policy, batch)
    decoder, reward = Decoder(learner.config.model.path), registry.load("shapes_alignment_soft")
    prompts = [chunk.trajectories.chunk.prompts[i % 4] for i in batch.trajectory_id.tolist()]
    for x, t, name in ((batch.x, batch.t, "gradient"), (batch.x_next, batch.t_next, "gradient_next")):
        x = x.detach().requires_grad_()
        inputs = (x, t, batch.embeddings, learner.config.sampler.guidance)
        output = learner.model.predict_reference(*inputs) if looking == "base" else learner.model.predict(*inputs)[0]
        value = reward(decoder(learner.kernel.clean(output, t, x)), prompts).sum()
        (expected,) = torch.autograd.grad(value, x)
        assert expected.abs().max() > 0
        if looking == "none":
            scored = batch.terminal if name == "gradient_next" else torch.zeros_like(batch.terminal)
            expected = expected * scored[:, None, None, None]
        off = batch.prepared[name] - expected
        assert off.norm() <= 0.02 * expected.norm() and off.abs().median() <= 1e-5 * expected.abs().max()


def test_groups_mix_trajectories_and_timesteps_and_do_not_depend_on_ranks(configured):
    learner = new_learner(configured("dag_kl"), version=1)
    chunk = Experience(*scored_epoch(learner.config, learner.published)[0])
    other = Experience(replace(chunk.trajectories, chunk=replace(chunk.trajectories.chunk, index=1)), chunk.scores)
    orders = [list(each.order(True)) for each in (chunk, chunk, other)]
    assert list(range(12)) == sorted(orders[0]) != orders[0] == orders[1] != orders[2]
    batch = chunk.gather(chunk.order(True)[:6], learner.model, learner.config)
    assert len(set(batch.trajectory_id.tolist())) > 2 and len(set(batch.t.tolist())) > 1


@pytest.mark.long
def test_replayed_updates_are_past_ones_and_counted(small_config):
    config = small_config("train.replay_updates=2", "train.replay_epochs=1", "flow.replay_epochs=1")
    learner = build.build_learner(config)
    for epoch in range(3):
        training = learner.train_epoch(epoch, BETA, [scored_epoch(config, learner.published)])
        learner.publish(epoch + 1)
        assert len(training.updates) == (1 if epoch == 0 else 3)
        if epoch:
            assert training.metrics["replay_age"] == 1 and training.updates[0].get("replay_age") is None
    assert len(learner.replay) == 1 and config.steps_per_epoch == 3


def test_the_learners_own_log_prob_replaces_the_samplers(configured):
    """In float32 the two are equal but for the batch's shape; a sampler's that is wrong no longer matters."""
    clipped = {}
    for who in ("sampler", "learner"):
        learner = new_learner(configured("dag_kl", f"objective.old_log_prob={who}"), version=1)
        trajectories, scores = scored_epoch(learner.config, learner.published)[0]
        chunk = Experience(replace(trajectories, log_pf=trajectories.log_pf + 5.0), scores)
        learner._prepare([chunk], BETA)
        with torch.no_grad():
            clipped[who] = learner.loss(next(learner._micro_batches(chunk, BETA)), BETA)[1]["clipped"].item()
    assert clipped == {"sampler": 1.0, "learner": 0.0}


def test_ddpo_standardises_over_the_whole_epoch_and_scores_the_images_alone(configured):
    learner = new_learner(configured("ddpo", "objective.advantage=epoch", "objective.last_transition=skip"))
    learner.objective.begin_epoch((0, 1, 2), ("", "", ""), (1.0, 2.0, 6.0), np.zeros((3, 0)), BETA)
    values = np.array([learner.objective._advantages[i] for i in range(3)])
    np.testing.assert_allclose(values, (np.array([1, 2, 6]) - 3) / np.std([1, 2, 6]))
    for _, scores in scored_epoch(learner.config, learner.published):
        assert np.isfinite(scores.rewards[:, -1]).all() and np.isnan(scores.rewards[:, :-1]).all()


QUIET = ("flow.fit_steps=0", "flow.warmup_steps=0")
RTB = ("objective.kind=rtb", "objective.last_transition=train", *QUIET)
NO_FLOW = "objective.kind=residual_nabla_db_no_flow"
WIDTHS = ("[]", "[0]", "[2,4]", "[20,32]")
MALFORMED = {"objective.kind": ("[dag_db]", "dag"), "objective.setting": ["{a: 1}"], "flow.widths": WIDTHS}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((*RTB, "objective.window=[0, 10]"), ("objective.window: [0, 10] is not within 0 to 9",)),
        ((*RTB, "objective.window=[3, 2]"), ("objective.window: [3, 2] is not within 0 to 9",)),
        ((*RTB, "objective.window=[-1, 2]"), ("objective.window: [-1, 2]",)),
        ((*RTB, "objective.window=[1]"), ("objective.window",)),
        ((*RTB, "objective.window=3"), ("objective.window",)),
        ((*RTB, "objective.window=some"), ("objective.window", "'all'")),
        (
            (*RTB, "objective.window=[0, 3]", "objective.last_transition=skip"),
            ("objective.window, objective.last_transition: give one of them",),
        ),
        ((*RTB, "sampler.noise=window"), ("sampler.noise: window, but objective.window is all",)),
        ((*RTB, "sampler.transitions=random"), ("sampler.transitions: rtb sums over trajectories",)),
        ((*RTB, "prompts.per_prompt=1"), ("prompts.per_prompt: rtb compares", "objective.log_z=learned")),
        ((*RTB, "objective.kind=grpo", "prompts.per_prompt=1"), ("prompts.per_prompt: grpo compares",)),
        *(
            ((f"objective.kind={kind}", f"train.{key}=1", *QUIET), (f"train.{key}=0", kind, "ratio", "dag_db"))
            for kind in ("dag_kl", "ddpo", "grpo")
            for key in ("replay_updates", "max_staleness")
        ),
        (("objective.kind=ddpo",), ("flow.fit_steps",)),
        ((NO_FLOW, "objective.forward_looking=none", *QUIET), ("nothing to learn from",)),
        (("objective.kind=nabla_db", "train.shuffle_rewards=true", *QUIET), ("shuffle_rewards",)),
        (("objective.kind=dag_kl", "objective.group_size=10"), ("objective.group_size: 10 does not divide the 144",)),
        *(((f"{key}={value}",), (key,)) for key, values in MALFORMED.items() for value in values),
    ],
)
def test_what_contradicts_an_objective_is_refused(overrides, said):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=overrides)
    assert all(word in str(caught.value) for word in said)


def test_a_window_is_read_from_yaml_and_from_a_command(tmp_path):
    (tmp_path / "run.yaml").write_text("sampler: {steps: 10, noise: window}\nobjective: {kind: rtb, window: [0, 3]}\n")
    for config in (
        load_config(tmp_path / "run.yaml"),
        load_config(overrides=[*RTB, "objective.window=[0,3]", "sampler.noise=window"]),
    ):
        again = Config.model_validate_json(config.model_dump_json())
        for each in (config, again):
            rollout = each.rollout_settings()
            assert each.objective.window == (0, 3) and each.objective.span(10) == (0, 4)
            assert (rollout.first, rollout.end, rollout.terminal, rollout.noise_steps) == (0, 4, None, 4)
    assert load_config(overrides=[*RTB, "objective.window=[0, 9]"]).rollout_settings().end is None
    assert load_config(overrides=[*RTB, "objective.log_z=learned", "prompts.per_prompt=1"])


@pytest.mark.parametrize("reduction", ["sum", pytest.param("mean", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["tb", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("rtb", "sub_tb"))])
def test_an_epochs_log_ratios_are_those_of_its_transitions(kind, reduction, configured):
    learner = new_learner(configured(kind, f"objective.log_prob_reduction={reduction}"), version=1)
    chunk = Experience(*scored_epoch(learner.config, learner.published)[0])
    batch = chunk.gather(np.arange(len(chunk)), learner.model, learner.config)
    objective = learner.objective
    expected = (objective.log_pf_old(batch) - objective.log_q(batch)).reshape(4, -1).numpy()
    close = {"rtol": 1e-4, "atol": 1e-2 if reduction == "sum" else 1e-5}
    np.testing.assert_allclose(objective.nats(chunk.trajectories), expected, **close)


@pytest.mark.parametrize("kind", ["rtb", "tb"])
def test_an_offset_of_rewards_and_an_untrained_last_transition_leave_no_residual(kind, configured):
    """log Z is of the rewards that the goal is of: of the image, less the offset."""
    more = ("objective.reward_offset=0.8", "objective.last_transition=skip", "objective.log_z=learned")
    learner = new_learner(configured(kind, *more), version=1)
    trajectories, scores = scored_epoch(learner.config, learner.published)[0]
    scores = replace(scores, rewards=np.full_like(scores.rewards, np.nan))
    scores.rewards[:, -1] = 0.7
    chunk = Experience(trajectories, scores)
    learner._prepare([chunk], BETA)
    (batches,) = [list(learner._micro_batches(chunk, BETA))]
    goal = torch.cat([learner.objective.goal(batch, BETA) for batch in batches])
    nats = torch.from_numpy(learner.objective.nats(trajectories).sum(1))
    by_prompt = torch.stack([nats[:2].mean(), nats[2:].mean()]).repeat_interleave(2)
    torch.testing.assert_close(goal.reshape(4, -1)[:, 0], by_prompt, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", ["dag_db", "residual_nabla_db"])
@pytest.mark.parametrize("widths", ["[8]", "[16,32]", "[24,48]", "[64,128,256,256]"])
def test_widths_that_are_not_refused_make_a_network(kind, widths, configured):
    config = configured(kind, f"flow.widths={widths}", "flow.stem_stride=1")
    for width in (64, None):
        flow = build.flow_network(config, (4, 16, 16), width)
        assert flow(torch.zeros(1, 4, 16, 16), torch.ones(1), torch.zeros(1, 3, width or 0)).abs().sum() == 0


def test_objectives_are_known_by_name_and_the_setting_sets_what_is_not_given():
    assert list(NEEDS) == list(OBJECTIVES) and all(kind.needs is NEEDS[name] for name, kind in OBJECTIVES.items())
    for more, said in (({}, "(faithful): target"), ({"penalty": "huber"}, "(faithful, but penalty): target")):
        assert said in describe(Config.model_validate({"objective": {"setting": "faithful", **more}}), 4)

    def settings(**given):
        return Config.model_validate({"objective": given}).objective

    for more, looking in (({}, "snapshot"), ({"forward_looking": "base"}, "base")):
        faithful = settings(setting="faithful", **more)
        assert (faithful.detach_next_flow, faithful.forward_looking) == (False, looking)
    nabla, corrected = settings(kind="residual_nabla_db", setting="faithful"), settings(kind="residual_nabla_db")
    assert nabla.reverse_transitions == "inner" and nabla.decay_terminal and nabla.regulariser == 1000
    assert nabla.transition_weight == "uniform" and not nabla.detach_next_flow
    assert corrected.reverse_transitions == "all" and corrected.forward_looking == "base"
    assert settings(kind="ddpo").regulariser == 0


@pytest.mark.parametrize("kind", KINDS)
def test_trying_a_micro_batch_changes_nothing(kind, configured):
    learner, other = (new_learner(configured(kind, "objective.advantage=prompt"), version=1) for _ in range(2))
    scored = scored_epoch(learner.config, learner.published)
    for size in (1, 2):
        other._try_micro_batch(size)
    torch.testing.assert_close(gradients(other, scored), gradients(learner, scored), rtol=0, atol=0)
    assert other.objective.memory == learner.objective.memory


@pytest.mark.parametrize("looking", ["base", pytest.param("snapshot", marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["dag_db", *(pytest.param(kind, marks=pytest.mark.long) for kind in GRADIENTS)])
def test_checkpointed_activations_give_the_same_gradient(kind, looking, configured):
    """Also of the frozen reference, whose backward pass comes when the adapter is on again."""
    on_off = (f"learner.gradient_checkpointing={on}" for on in (False, True))
    more = f"objective.forward_looking={looking}"
    whole, again = (new_learner(configured(kind, setting, more), version=1) for setting in on_off)
    assert again.model.unet.is_gradient_checkpointing and not whole.model.unet.is_gradient_checkpointing
    scored = scored_epoch(whole.config, whole.published)
    torch.testing.assert_close(gradients(again, scored), gradients(whole, scored), rtol=1e-5, atol=1e-7)
