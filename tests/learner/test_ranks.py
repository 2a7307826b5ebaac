"""Ranks stopped after an update and restored in new processes end bitwise as ranks unbroken."""

import pytest
import torch
from scored_epochs import scored_epoch
from test_process_group import Ranks

from learner import build, process_group, state
from learner.config import Config

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
