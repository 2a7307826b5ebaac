import pytest

from cluster.placement import PlacementError, place


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
