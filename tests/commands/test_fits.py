"""What fits into a GPU, by hand."""

import pytest

from cluster.nodes import Node
from cluster.placement import Placement, Share, place_for
from commands import fits, memory
from learner.config import Config
from learner.run import main

GB = 10**9
ALONE = Placement(Share(1), Share(1), Share(1))
# Guidance: two passes. A sampler holds 3 GB, a reward actor 2, a learner rank 3 + 1 + 2 + 4 x .25 = 7.
HELD = memory.Memory(
    encoders=0, embedding=0, network=2 * GB, lora=GB, flow=GB // 4, decoders=GB, forward=GB // 8, train=GB,
    flow_train=0, decode=GB // 4, reward=GB,
)  # fmt: skip
BASE = (
    "sampler.guidance=3", "learner.micro_batch=null", "flow.fit_steps=0", "flow.warmup_steps=0", "model.device=auto",
    "sampler.actors=1", "reward.actors=1", "learner.ranks=1",
)  # fmt: skip


def said(config: Config, size: float, held: memory.Memory = HELD, gpus: int = 1) -> list[str]:
    placement, resources = ALONE, {"CPU": 16.0, "GPU": float(gpus)}
    if config.run.runner != "inprocess":
        placement = place_for(config, [Node("here", 16.0, gpus)])
    return fits.lines(config, placement, resources, size * GB, held)


def test_one_gpu_is_shared_and_a_fifth_of_what_is_free_is_left(small_config):
    """12 GB stay and 1.5 are CUDA's: of 10.5 free in 24, 8.4. The reward actor has a third; the rank, alone, all."""
    head, sampler, actor, rank = said(small_config(*BASE), 24)
    assert head.startswith("1 sampler, 1 reward actor, 1 learner rank: 13.5 GB stay, of which 1.5 GB are CUDA's own")
    assert head.endswith("at most 21.5 GB, in training")
    assert sampler.endswith("0.25 GB a sample, 5.6 GB free for it: sampler.chunk_size=4 fits (at most 22)")
    assert actor.endswith("0.25 GB an image, 2.8 GB free for it: reward.batch=8 fits (at most 11)")
    assert rank.endswith("2 GB a transition, 8.4 GB free for it: learner.micro_batch=4 fits (at most 4)")


def test_ranks_that_train_beside_the_others_have_their_part_and_in_process_nothing_is_divided(small_config):
    head, sampler, _, rank = said(small_config(*BASE, "train.max_staleness=1"), 24)
    assert "2.8 GB free for it" in sampler
    assert rank.endswith("2.8 GB free for it: learner.micro_batch=1 fits (at most 1)")
    assert head.endswith("at most 18.5 GB, in sampling, scoring and training at once")  # 13.5 + 1 + 2 + 2
    one, _, actor, _ = said(small_config(*BASE, "run.runner=inprocess"), 24)
    assert one.startswith("all in one process: 10.5 GB stay") and "10.8 GB free" in actor


def test_a_gpu_for_each_kind_is_judged_alone(small_config):
    more = ("sampler.actors=2", "reward.actors=1", "learner.ranks=1", "learner.gpus=1")
    both = said(small_config(*BASE, *more), 24, gpus=2)
    heads = [line for line in both if "stay" in line]
    assert [head.split(":")[0] for head in heads] == ["2 samplers, 1 reward actor", "1 learner rank"]


def test_what_does_not_fit_is_said_with_the_setting_that_helps_or_the_gpu_that_would_do(small_config, monkeypatch):
    monkeypatch.setattr(fits, "networks", lambda config: config)
    less = HELD.__class__(**{**vars(HELD), "train": GB // 4})
    counted = lambda config, parts: less if config.learner.gradient_checkpointing else HELD  # noqa: E731
    monkeypatch.setattr(memory, "count", counted)
    *_, rank, remedy = said(small_config(*BASE), 15.5)  # 2 free, 1.6 of them
    assert rank.endswith("learner.micro_batch=1 does not fit")
    assert remedy == "does not fit: set learner.gradient_checkpointing=true"
    *_, remedy = said(small_config(*BASE, "learner.gradient_checkpointing=true"), 15, less)
    assert remedy.startswith("does not fit: set sampler.chunk_size=2")
    *_, remedy = said(small_config(*BASE, "model.dtype=bfloat16", "learner.gradient_checkpointing=true"), 8, less)
    assert "it takes a GPU of 15.4 GB, or with sampler.chunk_size=1, reward.gpus=0" in remedy
    assert "learner rank 8.12 GB" in remedy  # 7 + .5 + .5 / .8


def test_the_plan_answers_for_a_gpu_that_is_not_here(small_settings, tmp_path, capsys):
    assert (
        main([*small_settings, f"run.dir={tmp_path / 'run'}", "sampler.actors=1", "--plan", "--gpu-memory", "24"]) == 0
    )
    out = capsys.readouterr().out
    assert "a GPU of 24 GB" in out and "1 sampler, 1 reward actor, 1 learner rank:" in out
    assert "1 learner rank, each" in out and "GPU" in out.split("actors")[1].splitlines()[0]


@pytest.mark.parametrize(
    "flags", [["--tflops", "5"], ["--measure"], ["--gpu-memory", "24"], ["--plan", "--tflops", "-1"]]
)
def test_flags_of_a_plan_go_with_it_and_are_positive(flags, capsys):
    with pytest.raises(SystemExit):
        main(flags)
    assert "--plan" in capsys.readouterr().err
