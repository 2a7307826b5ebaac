"""Counts and shares of the roles, from what the nodes have."""

import json
import re
import threading
import time
from types import SimpleNamespace

import pytest
import ray

from cluster import nodes, placement
from cluster.nodes import Node
from cluster.placement import Placement, PlacementError, counts_now, place_for
from cluster.waits import DeadlineExceeded
from learner.config import ConfigError, load_config


def place(counts, nodes, *more, chunks=4, gpus=(None,) * 3, labels=({},) * 3) -> Placement:
    """Of samplers, reward actors and ranks; None as the counts: those are found. `more` are settings."""
    settings = [f"train.trajectories={4 * chunks}", "sampler.chunk_size=4", "train.updates_per_epoch=1"]
    keys = ("sampler.actors", "reward.actors", "learner.ranks")
    for key, count, share, selector in zip(keys, counts or (None,) * 3, gpus, labels, strict=True):
        role = key.split(".")[0]
        settings += [f"{key}={count or 'null'}", f"{role}.gpus={'null' if share is None else share}"]
        settings.append(f"{role}.labels={json.dumps(selector)}")
    return place_for(load_config(overrides=[*settings, *more]), nodes)


def several(*machines: tuple) -> list[Node]:
    """(CPUs, GPUs, labels) each."""
    return [Node(f"10.0.0.{i}", *has, labels=labels, id=f"id{i}") for i, (*has, labels) in enumerate(machines, 1)]


def machine(cpus: float, gpus: float = 0.0) -> list[Node]:
    return several((cpus, gpus, {}))


def shares(placement: Placement) -> tuple:
    return placement.samplers, placement.scorers, placement.ranks


def total(placement: Placement, resource: str) -> float:
    return sum(share.count * getattr(share, resource) for share in shares(placement))


def test_explicit_counts_fit_on_two_cores():
    placement = place((3, 1, 2), machine(2.0))
    assert [share.count for share in shares(placement)] == [3, 1, 2]
    assert 1.5 < total(placement, "cpus") <= 2
    assert placement.describe() == "3 samplers, 1 scorer, 2 learner ranks"
    config = load_config(overrides=["sampler.actors=1", "reward.actors=2"])
    assert place_for(config, machine(2.0), learner=False).describe() == "1 sampler, 2 scorers"


@pytest.mark.parametrize("cpus", [1, 2, 8, 64])
def test_counts_found_from_the_resources_fit_and_divide_the_work(cpus):
    placement = place(None, machine(float(cpus)))
    assert total(placement, "cpus") <= cpus
    assert 4 % placement.ranks.count == 0


@pytest.mark.parametrize("gpus", range(1, 9))
def test_gpu_fractions_pack_onto_single_devices_and_each_rank_gets_a_whole_one_where_there_are_enough(gpus):
    placement = place(None, machine(64.0, float(gpus)), chunks=8)
    assert total(placement, "gpus") <= gpus and (placement.ranks.gpus == 1 or gpus < 8)
    placement = place(None, machine(64.0, float(gpus)), chunks=16)
    shares = [placement.ranks.gpus] * placement.ranks.count
    shares += [placement.samplers.gpus] * (placement.samplers.count + placement.scorers.count)
    free = [1.0] * gpus
    for share in sorted(shares, reverse=True):
        device = max(range(gpus), key=free.__getitem__)
        free[device] -= share
        assert free[device] >= -1e-9


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
    placement = place((2, 2, 2), machine(16.0, 8.0), gpus=each)
    assert total(placement, "gpus") <= 8
    assert tuple(share.gpus for share in shares(placement)) == expected


GPUS, TWO_WITH_GPUS = machine(16.0, 8.0), several((4.0, 2.0, {}), (4.0, 2.0, {}))


@pytest.mark.parametrize(
    ("counts", "nodes", "gpus", "said"),
    [
        ((1, 1, 1), [], (None,) * 3, "no CPUs to give"),
        ((2, 1, 2), GPUS, (2, 1, 4), "2 x 2 + 1 x 1 + 2 x 4 = 13 GPUs asked for, the cluster has 8"),
        ((2, 1, 2), machine(16.0), (None, None, 1), "the cluster has 0"),
        ((2, 1, 2), GPUS, (1.5, None, None), "sampler.gpus: 1.5 is neither"),
        ((1, 1, 1), TWO_WITH_GPUS, (4, 0, 0), "do not fit on single nodes"),
        ((3, 1, 1), machine(8.0, 2.0), (0.6, 0, 0), "do not fit on single nodes"),  # 2/3 of a GPU leave 1/3 unused
    ],
)
def test_what_cannot_be_placed_is_refused(counts, nodes, gpus, said):
    with pytest.raises(PlacementError, match=re.escape(said)):
        place(counts, nodes, gpus=gpus)


def test_a_gpu_model_without_gpus_is_refused():
    with pytest.raises(PlacementError, match="cuda was asked for"):
        place(None, machine(2.0), "model.device=cuda")
    assert total(place(None, machine(2.0, 8.0), "model.device=cpu"), "gpus") == 0


def test_a_share_fits_on_single_nodes():
    """Three CPUs of which no two are on the node that samplers must go to."""
    nodes = several((1.0, 0.0, {"kind": "small"}), (2.0, 0.0, {}))
    assert place((2, 1, 1), nodes).samplers.cpus == 0.5
    placement = place((3, 1, 1), nodes, labels=({"kind": "small"}, {}, {}))
    assert placement.samplers.cpus == pytest.approx(1 / 3, abs=1e-3)
    halves = several((0.5, 0.0, {}), (0.5, 0.0, {}), (0.5, 0.0, {}))
    assert place((1, 1, 1), halves).samplers.cpus <= 0.5


def test_labels_mean_what_they_mean_to_ray():
    kinds = {"a100": [1], "!a100": [2, 3], "in(a100,cpu)": [1, 2], "!in(a100,cpu)": [3], "a10": []}
    nodes = several((4.0, 2.0, {"kind": "a100"}), (4.0, 0.0, {"kind": "cpu"}), (4.0, 0.0, {}))
    selectors = [({"kind": kind}, meant) for kind, meant in kinds.items()]
    for selector, meant in (*selectors, ({"kind": "a100", "market": "spot"}, []), ({}, [1, 2, 3])):
        assert [i for i, node in enumerate(nodes, 1) if node.matches(selector)] == meant, selector


def test_a_label_that_no_node_has_is_said_at_once_unless_nodes_will_come():
    nodes, labels = several((4.0, 0.0, {"kind": "cpu"})), ({"kind": "in(a100, h100)"}, {}, {})
    with pytest.raises(PlacementError) as caught:
        place(None, nodes, labels=labels)
    assert "sampler.labels: no node has {'kind': 'in(a100,h100)'}" in str(caught.value)
    assert "node 10.0.0.1: 4 CPU" in str(caught.value) and "labels {'kind': 'cpu'}" in str(caught.value)
    coming = place(None, nodes, "run.autoscale=true", gpus=(1, None, None), labels=labels).samplers
    assert coming.gpus == 1 and coming.spread["label_selector"] == {"kind": "in(a100,h100)"}


@pytest.mark.parametrize("wrong", ["in()", "!!a", "in(a", "-a", "a b"])
def test_what_is_no_label_selector_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"reward\.labels: .*expected a node label's value as VALUE, !VALUE, in"):
        place(None, [], labels=({}, {"kind": wrong}, {}))


def test_samplers_on_nodes_without_gpus_get_none():
    nodes = several((8.0, 2.0, {"kind": "gpu"}), (8.0, 0.0, {"kind": "cpu"}))
    placement = place(None, nodes, labels=({"kind": "cpu"}, {"kind": "cpu"}, {"kind": "gpu"}))
    assert "num_gpus" not in placement.samplers.spread and "num_gpus" not in placement.scorers.spread
    assert placement.ranks.gpus == 1 and placement.ranks.labels == {"kind": "gpu"}


def test_automatic_counts_are_those_of_the_nodes_that_a_role_may_use():
    nodes = several(*[(8.0, 1.0, {"kind": "a"})] * 3, (8.0, 1.0, {"kind": "b"}))
    placement = place(None, nodes, labels=({"kind": "b"}, {}, {}))
    assert (placement.samplers.count, placement.ranks.count) == (1, 2)
    placement = place(None, nodes, labels=({}, {}, {"kind": "b"}))
    assert (placement.samplers.count, placement.ranks.count) == (3, 1)


AUTOMATIC = ("learner.ranks=1", "sampler.actors=null", "reward.actors=null")
CPU_NODES = several((2.0, 0.0, {}), (2.0, 0.0, {}), (2.0, 0.0, {}))


def test_automatic_counts_follow_the_nodes_and_given_ones_stay_while_they_fit():
    config = load_config(overrides=AUTOMATIC)
    start = place_for(config, CPU_NODES)
    assert (start.samplers.count, start.scorers.count) == counts_now(config, start, CPU_NODES) == (3, 1)
    assert counts_now(config, start, CPU_NODES[:2]) == (2, 1)
    assert counts_now(config, start, CPU_NODES[:1]) == (1, 1)
    assert counts_now(config, start, [*CPU_NODES, *several((1.0, 0.0, {}))]) == (4, 1)
    assert counts_now(config, start, [*CPU_NODES, *CPU_NODES]) == (7, 2)
    fixed = load_config(overrides=[*AUTOMATIC, "sampler.actors=3"])
    start = place_for(fixed, CPU_NODES)
    assert counts_now(fixed, start, [*CPU_NODES, *CPU_NODES]) == (3, 2)
    assert counts_now(fixed, start, CPU_NODES[:1]) == (1, 1)  # or one role would starve the other
    assert counts_now(fixed, start, []) == (1, 1)
    both = load_config(overrides=[*AUTOMATIC, "sampler.actors=3", "reward.actors=2"])
    assert counts_now(both, place_for(both, CPU_NODES), CPU_NODES[:2]) == (1, 2)  # no more goes than must


def test_a_node_that_the_samplers_may_not_use_changes_nothing():
    nodes = several((4.0, 0.0, {"kind": "learner"}), (4.0, 0.0, {"kind": "sampler"}))
    labels = ("learner.labels={kind: learner}", "sampler.labels={kind: sampler}", "reward.labels={kind: sampler}")
    config = load_config(overrides=[*AUTOMATIC, *labels])
    start = place_for(config, nodes)
    assert counts_now(config, start, [*nodes, *several((8.0, 0.0, {"kind": "learner"}))]) == (start.samplers.count, 2)
    assert counts_now(config, start, [*nodes, *several((4.0, 0.0, {"kind": "sampler"}))])[0] > start.samplers.count


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_joined_gpus_are_used_and_never_more_than_there_are(gpus):
    config = load_config(overrides=[*AUTOMATIC, "model.device=auto"])
    nodes = several((32.0, 4.0, {}))
    start = place_for(config, nodes)
    more = [*nodes, *several((32.0, float(gpus), {}))]
    samplers, scorers = counts_now(config, start, more)
    assert samplers > start.samplers.count
    used = start.ranks.count * start.ranks.gpus + (samplers + scorers) * start.samplers.gpus
    assert used <= 4 + gpus


@pytest.mark.parametrize("waiting_for", ["room", "actors"])
def test_a_head_that_is_lost_while_a_run_waits_is_said_in_one_line(waiting_for, monkeypatch):
    """Ray's own waits for room keep no deadline then, and end the process after a minute."""
    hung = threading.Event()
    monkeypatch.setattr(placement, "placement_group", lambda *a, **b: SimpleNamespace(wait=lambda seconds: hung.wait()))
    monkeypatch.setattr(placement, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(placement, "LOST_SECONDS", 0.3)

    def gone(*arguments, **options):
        raise ray.exceptions.RpcError("Deadline Exceeded")

    monkeypatch.setattr(nodes, "get_cluster_status", gone)
    monkeypatch.setattr(placement, "done", lambda refs, *_, **__: [])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    with pytest.raises(DeadlineExceeded, match=r"control store at 10\.0\.0\.1:6379 did not answer within 0\.3 s"):
        if waiting_for == "room":
            placement.reserve(place((1, 1, 1), machine(4.0)), 1e9)
        placement.ready({"samplers": (None, ["not up yet"])}, time.monotonic() + 1e9, 1e9)
    hung.set()


def test_a_store_that_is_gone_or_late_leaves_no_threads_traceback(monkeypatch, capfd):
    answers = [None, SimpleNamespace(active_nodes=[], idle_nodes=[])]

    def second_time(address):
        if answer := answers.pop():
            answers.clear()
            return answer
        raise ray.exceptions.RpcError("Deadline Exceeded")

    answers.reverse()
    monkeypatch.setattr(nodes, "get_cluster_status", second_time)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    assert nodes.alive_nodes() == []
    assert "Traceback" not in capfd.readouterr().err
