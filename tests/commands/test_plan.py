"""The plan's numbers against what a run really does, and against published counts."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from golden import inputs
from transformers import CLIPConfig

from cluster.nodes import Node
from cluster.placement import place_for
from commands import plan
from learner import build
from learner.config import load_config
from learner.protocol.chunks import training_chunks
from learner.run import main
from rewards import clip, clip_score, pickscore


@pytest.fixture(scope="module")
def cost(small_settings) -> plan.Costs:
    return plan.costs(load_config(overrides=small_settings))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["objective.last_transition=train", "objective.forward_looking=none"],
        ["sampler.transitions=random", "sampler.transition_fraction=0.5", "objective.forward_looking_from=2"],
    ],
)
def test_counts_and_bytes_are_those_of_a_real_epoch(small_config, cost, overrides):
    config = small_config("run.runner=inprocess", "flow.replay_epochs=1", *overrides)
    sampler, learner = build.build_sampler(config), build.build_learner(config)
    chunks = training_chunks(config, ["a red circle", "a blue ring"], 0)
    made = [sampler.sample(chunk, learner.published) for chunk in chunks]
    each = plan.work(config, cost, ranks=1)
    assert each.transitions == sum(trajectories.selected.size for trajectories, _ in made)
    assert each.states_scored == sum(len(clean.latents) for _, clean in made)


def held(record: Any) -> int:
    """Bytes of a record's arrays."""
    values = [
        value for each in vars(record).values() for value in (each.values() if isinstance(each, dict) else [each])
    ]
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


# Numbers are to outweigh what a file says beside them.
LARGER = "lora.rank=32", "flow.widths=[32,32]", "flow.batch=4", "flow.replay_epochs=2", "train.replay_epochs=2"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dag_db", "nabla_db", "fitted_nabla_db", "ddpo", "natural"])
def test_the_object_store_holds_what_a_real_epoch_puts_there(kind, small_settings, settings_of):
    """Arrays of trajectories, clean predictions and scores, the adapter twice, and the files of a checkpoint that has
    all the epochs which may be trained on again."""
    natural = [
        "learner.optimizer=natural", "learner.natural_epochs=2", "train.replay_updates=0", "train.trajectories=16",
        "objective.regulariser=0", "objective.penalty=squared", "objective.transition_weight=uniform",
    ]  # fmt: skip
    more = settings_of("dag_db" if kind == "natural" else kind) + natural * (kind == "natural")
    config = load_config(overrides=[*small_settings, *more, "run.runner=inprocess", *LARGER])
    sampler, scorer, learner = build.build_sampler(config), build.build_scorer(config), build.build_learner(config)
    made = [sampler.sample(chunk, learner.published) for chunk in training_chunks(config, ["a ring", "a star"], 0)]
    scored = [(trajectories, scorer.score(clean)) for trajectories, clean in made]
    for epoch in range(max(1, config.kept_epochs)):
        learner.train_epoch(epoch, 1.0, [scored])
    files = sum(map(len, learner.state_files().values()))
    arrays = sum(held(record) for pair in [*made, *scored] for record in pair) - sum(held(t) for t, _ in made)
    each = plan.work(config, plan.costs(config), ranks=1)
    assert each.trajectories == pytest.approx(arrays, rel=0.05)
    assert each.version == learner.published.flat.nbytes
    assert each.checkpoint == pytest.approx(files, rel=0.05)
    assert each.object_store == pytest.approx(arrays + 2 * each.version + files, rel=0.05)


def test_flops_of_a_known_network_are_the_published_ones():
    """Stable Diffusion 1.5's U-Net: 0.80 TFLOP a sample; its decoder: 2.51 (counted independently)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        x, t, embedding = torch.zeros(1, 4, 64, 64), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 77, 768)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        )  # fmt: skip
    assert plan._count(lambda: unet(x, t, encoder_hidden_states=embedding).sample) == pytest.approx(0.80e12, rel=0.02)
    assert plan._count(lambda: vae.decode(x).sample) == pytest.approx(2.51e12, rel=0.02)


def test_the_plan_is_text_and_nothing_starts(small_settings, tmp_path, capsys):
    assert main([*small_settings, f"run.dir={tmp_path / 'run'}", "--plan"]) == 0
    said = capsys.readouterr().out
    words = "samplers", "learner rank", "trajectories", "updates", "FLOP", "object store", "disk"
    assert all(word in said for word in (str(tmp_path / "run"), *words))
    assert not (tmp_path / "run").exists()


def test_resources_of_actors_are_shown(cost, monkeypatch):
    monkeypatch.setattr(plan, "costs", lambda config: cost)
    config = load_config(overrides=["sampler.actors=2", "reward.actors=1", "learner.ranks=2"])
    placement = place_for(config, [Node("here", 16.0, 8.0)])
    said = plan.describe(config, placement, {"CPU": 16.0, "GPU": 8.0}, "here")
    assert "2 learner ranks, each 1 CPU, 1 GPU" in said


def test_flops_count_every_pass_of_a_network(small_config, cost):
    """An independent count on paper: 8 trajectories of 4 steps, the last of them not trained on."""
    for guidance, passes in ((1, 1), (3, 2)):
        for looking, extra in (("none", 0), ("base", 4 * passes)):
            config = small_config(
                f"sampler.guidance={guidance}", f"objective.forward_looking={looking}", "flow.fit_steps=0"
            )
            each = plan.work(config, cost, ranks=1)
            assert each.rollout == 8 * (4 * passes + extra) * cost.unet
            assert each.training == 8 * 3 * (passes * cost.unet_train + 2 * cost.flow_train)
            assert each.evaluation == 4 * (4 * passes * cost.unet + cost.decode)


def test_reward_models_cost_what_their_networks_do():
    """Whose counts are about the published ones: ViT-H/14 0.33 TFLOP an image, its text tower 0.05 more; ViT-L/14
    0.16, its text tower 0.013 more; ViT-L/16 0.12 and a BERT."""
    published = {"hpsv2": 0.38e12, "pickscore": 0.38e12, "aesthetic": 0.16e12, "imagereward": 0.135e12}
    for name, flops in {**published, "clip_score": 0.175e12}.items():
        assert plan.REWARDS[name] == pytest.approx(flops, rel=0.05)
    with torch.device("meta"):
        pixels, ids = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.int64)
        networks = {
            "hpsv2": clip.Network(clip.vit_h()),
            "pickscore": pickscore.Network(clip.vit_h()),
            "clip_score": clip_score.Network(CLIPConfig(**inputs.PUBLISHED_CLIP)),
        }
    for name, network in networks.items():
        assert plan.REWARDS[name] == pytest.approx(plan._count(lambda network=network: network(pixels, ids)), rel=1e-4)


def test_cheap_values_cost_what_they_decode(small_config):
    config = small_config("objective.forward_looking_decoder=tiny", "model.tiny_decoder=models/shapes/tiny_decoder")
    cost = plan.costs(config)
    each = plan.work(config, cost, 1)  # 8 trajectories: the image and the state before it whole, three before those
    assert 0 < cost.tiny < 0.4 * cost.decode
    assert each.decoding == 8 * (2 * cost.decode + 3 * cost.tiny)
    late = plan.work(small_config("objective.forward_looking_from=2"), cost, 1)
    assert late.decoding == 8 * 3 * cost.decode


def test_trajectories_of_an_earlier_policy_cost_the_pass_that_the_regulariser_needs(small_config, cost):
    base = ("sampler.guidance=3", "train.updates_per_epoch=2")
    plain, lagging, free = (
        plan.work(small_config(*base, *more), cost, 1)
        for more in ((), ("train.max_staleness=1",), ("train.max_staleness=1", "objective.regulariser=0"))
    )
    # two passes under guidance, for the second of the two updates
    assert lagging.training - plain.training == plain.transitions / 2 * 2 * cost.unet and free == plain


def test_a_window_to_be_measured_and_what_is_behind_it_are_counted(small_config, cost):
    auto = small_config("objective.window=auto", "objective.last_transition=train")
    (said, until) = plan._window(auto, cost)
    assert "1536 transitions, 576 pictures" in said and "all transitions" in until
    settings = "objective.window=[0, 1]", "objective.last_transition=train"
    assert plan._window(small_config(*settings), cost) == []
    plain, held = (plan.work(small_config(*settings, *more), cost, 1) for more in ((), ("objective.later_kl=1",)))
    more = 8 * 2 * 2 * (cost.unet_train + cost.unet)  # trajectories, transitions, guidance
    assert held.training - plain.training == pytest.approx(more)
