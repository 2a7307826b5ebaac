"""Ranks stopped and restored in new processes end bitwise as ranks unbroken; two train what one does."""

import numpy as np
import pytest
import torch
from scored_epochs import scored_epoch, stir
from test_process_group import Ranks

from learner import build, process_group, state
from learner.config import Config
from learner.update import Learner

BETA = 5.0


def _train(rank, count, address, config: Config, epochs, files, queue) -> None:
    torch.set_num_threads(1)
    process_group.join(address, rank, count, 60, whole_gpu=False)
    learner = build.build_learner(config, files)
    for epoch in epochs:
        learner.train_epoch(epoch, BETA, [scored_epoch(config, learner.published, epoch)[rank::count]])
        learner.publish(epoch + 1)
    queue.put((rank, learner.state_files()))
    torch.distributed.destroy_process_group()


def trained(count: int, config: Config, epochs, files=None) -> dict[str, bytes]:
    with Ranks(_train, count, config, list(epochs), files, needs="learner.build") as ranks:
        answers = dict(ranks.answers(count, seconds=240))
    return {name: content for files in answers.values() for name, content in files.items()}


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
def test_ranks_that_were_stopped_go_on_bitwise(count, small_config):
    settings = "sampler.chunk_size=2", "train.epochs=3", "flow.fit_steps=1"
    config = small_config(f"train.trajectories={4 * count}", *settings)
    unbroken = trained(count, config, range(3))
    resumed = trained(count, config, range(1, 3), trained(count, config, range(1)))
    assert sorted(unbroken) == sorted(resumed) and len(unbroken) > count
    assert all(unbroken[name] == resumed[name] for name in unbroken if name.startswith("lora/"))
    one, other = (state.parse(files[state.LEARNER_FILE]) for files in (unbroken, resumed))
    torch.testing.assert_close(one["flow"], other["flow"], rtol=0, atol=0)
    for optimizer in ("policy_optimizer", "flow_optimizer"):
        torch.testing.assert_close(one[optimizer]["state"], other[optimizer]["state"], rtol=0, atol=0)


MODELS = {
    "tiny_sdxl": (),
    "tiny_sd3": ("model.text_tokens=16",),
    "tiny_flux": ("model.text_tokens=16", "model.pixels=64"),
}


def _stirred(config: Config) -> Learner:
    """It steps along the gradient: Adam's first steps have its signs alone, and where one is all but zero rounding
    decides on the sign."""
    learner = build.build_learner(config)
    learner.policy_optimizer = torch.optim.SGD(learner.policy_parameters, config.learner.learning_rate)
    stir(learner)
    learner.publish(1)
    return learner


def _lora_after(config: Config, scored) -> np.ndarray:
    """[P], after two updates on this rank's share of an epoch."""
    learner, half = _stirred(config), len(scored) // 2
    learner.train_epoch(0, BETA, [scored[:half], scored[half:]])
    return learner.publish(2).flat


def _share(rank, count, address, configs, epochs, queue) -> None:
    torch.set_num_threads(1)
    process_group.join(address, rank, count, 60, whole_gpu=False)
    for model, config in configs.items():
        queue.put((model, rank, _lora_after(config, epochs[model][rank::count])))
    torch.distributed.destroy_process_group()


@pytest.mark.long
def test_two_ranks_train_the_lora_that_one_trains_on_every_kind_of_model(small_config, settings_of, request):
    """By rtb: it has no flow network, whose Adam would do the same to its first steps."""
    common = [*settings_of("rtb"), "sampler.chunk_size=2", "train.updates_per_epoch=2", "learner.learning_rate=1e-3"]
    common += ["learner.max_grad_norm=1e9", "objective.last_transition=skip"]
    configs, epochs, start = {}, {}, {}
    for model, own in MODELS.items():
        path = f"model.path={request.getfixturevalue(model)}"
        configs[model] = small_config(*common, path, *own)
        snapshot = _stirred(configs[model]).published
        epochs[model], start[model] = scored_epoch(configs[model], snapshot), snapshot.flat
    with Ranks(_share, 2, configs, epochs, needs="learner.build") as ranks:
        shared = {(model, rank): flat for model, rank, flat in ranks.answers(2 * len(configs), seconds=240)}
    for model, config in configs.items():
        one = _lora_after(config, epochs[model])
        assert np.array_equal(shared[model, 0], shared[model, 1])
        moved, difference = np.linalg.norm(one - start[model]), np.abs(shared[model, 0] - one).max()
        print(f"{model}: 2 ranks against 1: largest difference {difference / moved:.1e} of the LoRA's way, {moved:.1e}")
        assert 0 < difference < 1e-5 * moved
