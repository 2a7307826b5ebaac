"""Hours of a plan, by hand: who works beside whom; and rates, from seconds that are made up."""

import dataclasses
from unittest import mock

import pytest

from cluster.placement import Placement, Share
from commands import hours, plan
from learner.config import load_config
from learner.run import main

WORK = plan.Work(
    rollout=40e12, decoding=10e12, scoring=10e12, training=30e12, evaluation=2e12, transitions=1, states_scored=8,
    trajectories=1, checkpoint=1, thumbnails=1, version=1,
)  # fmt: skip
ON_THREE = Placement(Share(1, gpus=1.0), Share(1, gpus=1.0), Share(1, gpus=1.0))
ON_ONE = Placement(Share(1, gpus=1 / 3), Share(1, gpus=1 / 3), Share(1, gpus=1 / 3))


@pytest.fixture(scope="module")
def cost(small_settings) -> plan.Costs:
    return plan.costs(load_config(overrides=small_settings))


@pytest.mark.parametrize(
    ("placement", "devices", "settings", "epoch"),
    [
        (ON_THREE, 3, (), 40 + 30),  # scoring is beside sampling
        (ON_THREE, 3, ("train.max_staleness=1",), 40),
        (ON_ONE, 1, (), 40 + 20 + 30),
        (ON_ONE, 1, ("train.max_staleness=1",), 90),
        (ON_THREE, 1, ("run.runner=inprocess",), 90),
        # Two chunks on four samplers leave two idle.
        (dataclasses.replace(ON_THREE, samplers=Share(4, gpus=1.0), scorers=Share(2, gpus=1.0)), 7, (), 20 + 30),
        (dataclasses.replace(ON_THREE, ranks=Share(3, gpus=1.0)), 5, (), 40 + 10),
    ],
)
def test_an_epoch_takes_what_its_parts_do_side_by_side(small_config, cost, placement, devices, settings, epoch):
    took = hours.seconds(small_config(*settings), placement, devices, WORK, cost, hours.stated(1.0))
    assert took.epoch == pytest.approx(epoch)


def test_rates_are_work_over_seconds_and_the_reward_is_called(small_config, cost):
    config = small_config("sampler.guidance=3", "run.runner=inprocess")
    runs = []
    with mock.patch.object(hours, "_seconds", lambda step, cuda: (step(), runs.append(step), 2.0)[2]):
        rates = hours.measured(config, cost)
    assert len(runs) == 4
    # Four transitions of two passes in two seconds.
    assert (rates.forward, rates.train) == pytest.approx((4 * cost.unet, 4 * cost.unet_train))
    assert rates.decode == pytest.approx(cost.decode / 2) and rates.reward == 2.0
    took = hours.seconds(config, ON_ONE, 1, WORK, cost, rates)
    assert took.scoring == pytest.approx(WORK.decoding / rates.decode + 8 * 2.0)


def test_a_reward_that_cannot_be_made_is_named_and_a_model_that_is_too_large_refused(small_config, cost):
    with mock.patch.object(hours, "_seconds", lambda step, cuda: (step(), 2.0)[1]):
        rates = hours.measured(small_config("reward.name=hpsv2"), cost)
    assert rates.reward is None and "hpsv2 could not be timed" in rates.basis
    large = dataclasses.replace(cost, held=dataclasses.replace(cost.held, network=10**15))
    with pytest.raises(hours.NotMeasurable, match="GB are free here; state a rate"):
        hours.measured(small_config(), large)


def test_the_plan_says_hours_and_what_they_rest_on(small_settings, tmp_path, capsys):
    for flags, basis in (
        (["--tflops", "0.05"], "0.05 TFLOP/s a device in every part"),
        (["--measure"], "timed here on"),
    ):
        assert main([*small_settings, f"run.dir={tmp_path / 'run'}", "--plan", *flags]) == 0
        out = capsys.readouterr().out
        assert "the run" in out and f"by {basis}" in out and "an epoch " in out.split("time  ")[1]
    assert "s an image" in out  # the reward's own time, which no FLOPs say
