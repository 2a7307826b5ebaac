import pytest

from cluster.placement import PlacementError, place, place_for


def total(placement, resource: str) -> float:
    parts = (
        (placement.samplers, placement.sampler_options),
        (placement.scorers, placement.scorer_options),
        (placement.ranks, placement.rank_options),
    )
    return sum(count * options.get(resource, 0) for count, options in parts)


def test_explicit_counts_fit_on_two_cores():
    placement = place(3, 1, 2, 4, {"CPU": 2.0})
    assert (placement.samplers, placement.scorers, placement.ranks) == (3, 1, 2)
    assert 1.5 < total(placement, "num_cpus") <= 2


@pytest.mark.parametrize("cpus", [1, 2, 8, 64])
def test_counts_found_from_the_resources_fit_and_divide_the_work(cpus):
    placement = place(None, None, None, 4, {"CPU": float(cpus)})
    assert total(placement, "num_cpus") <= cpus
    assert 4 % placement.ranks == 0


def test_each_rank_gets_a_whole_gpu_where_there_are_enough():
    placement = place(None, None, None, 8, {"CPU": 64.0, "GPU": 8.0})
    assert placement.rank_options["num_gpus"] == 1
    assert total(placement, "num_gpus") <= 8
    one = place(None, None, None, 8, {"CPU": 8.0, "GPU": 1.0})
    assert total(one, "num_gpus") <= 1


@pytest.mark.parametrize("gpus", range(1, 9))
def test_gpu_fractions_pack_onto_single_devices(gpus):
    placement = place(None, None, None, 16, {"CPU": 64.0, "GPU": float(gpus)})
    shares = [placement.rank_options["num_gpus"]] * placement.ranks
    shares += [placement.sampler_options["num_gpus"]] * (placement.samplers + placement.scorers)
    free = [1.0] * gpus
    for share in sorted(shares, reverse=True):
        device = max(range(gpus), key=free.__getitem__)
        free[device] -= share
        assert free[device] >= -1e-9


def test_what_cannot_be_placed_is_refused():
    with pytest.raises(PlacementError, match="CPU"):
        place(1, 1, 1, 1, {})
    with pytest.raises(PlacementError, match=r"learner\.ranks"):
        place(1, 1, 3, 4, {"CPU": 8.0})


@pytest.mark.parametrize(
    ("each", "expected"),
    [
        ((None, None, None), (1, 1, 1)),
        ((1, None, None), (1, 1, 1)),
        ((None, 0, None), (1, 0, 1)),
        ((0.5, 0, 2), (0.5, 0, 2)),
        ((2, 2, None), (2, 2, 0)),
    ],
)
def test_gpus_as_the_config_says_and_fair_shares_of_the_rest(each, expected):
    placement = place(2, 2, 2, 4, {"CPU": 16.0, "GPU": 8.0}, each)
    options = placement.sampler_options, placement.scorer_options, placement.rank_options
    got = tuple(option.get("num_gpus", 0) for option in options)
    assert total(placement, "num_gpus") <= 8
    assert got == expected


def test_more_gpus_than_there_are_is_refused_with_the_sum():
    with pytest.raises(PlacementError, match=r"2 x 2 \+ 1 x 1 \+ 2 x 4 = 13 GPUs asked for, the cluster has 8"):
        place(2, 1, 2, 4, {"CPU": 16.0, "GPU": 8.0}, (2, 1, 4))
    with pytest.raises(PlacementError, match="the cluster has 0"):
        place(2, 1, 2, 4, {"CPU": 16.0}, (None, None, 1))


def test_a_gpu_model_without_gpus_is_refused(small_config):
    with pytest.raises(PlacementError, match="cuda was asked for"):
        place_for(small_config("model.device=cuda"), {"CPU": 2.0})
    on_cpu = place_for(small_config("model.device=cpu"), {"CPU": 2.0, "GPU": 8.0})
    assert total(on_cpu, "num_gpus") == 0


def test_one_gpu_and_a_half_is_refused():
    with pytest.raises(PlacementError, match=r"sampler\.gpus: 1\.5 is neither"):
        place(2, 1, 2, 4, {"CPU": 16.0, "GPU": 8.0}, (1.5, None, None))
