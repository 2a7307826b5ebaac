import shutil
import tempfile
import threading
import time
from collections import Counter

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster import nodes as cluster_nodes
from cluster.nodes import Node, alive_nodes, listed
from cluster.placement import PlacementError, asks, counts_now, place, place_for
from cluster.readiness import Asked, in_group, ready, reserve
from cluster.waits import DeadlineExceeded
from learner.config import ConfigError


def machine(cpus: float, gpus: float = 0.0, **labels: str) -> list[Node]:
    """A machine."""
    return [Node("10.0.0.1", cpus, gpus, labels, id="id1")]


def several(*machines: tuple) -> list[Node]:
    """(CPUs, GPUs, labels) each."""
    return [Node(f"10.0.0.{i}", *machine, id=f"id{i}") for i, machine in enumerate(machines, 1)]


def total(placement, resource: str) -> float:
    parts = (
        (placement.samplers, placement.sampler_options),
        (placement.scorers, placement.scorer_options),
        (placement.ranks, placement.rank_options),
    )
    return sum(count * options.get(resource, 0) for count, options in parts)


def test_explicit_counts_fit_on_two_cores():
    placement = place(3, 1, 2, 4, machine(2.0))
    assert (placement.samplers, placement.scorers, placement.ranks) == (3, 1, 2)
    assert 1.5 < total(placement, "num_cpus") <= 2
    assert placement.describe() == "3 samplers, 1 scorer, 2 learner ranks"
    assert place(1, 2, 0, 4, machine(2.0)).describe() == "1 sampler, 2 scorers"


@pytest.mark.parametrize("cpus", [1, 2, 8, 64])
def test_counts_found_from_the_resources_fit_and_divide_the_work(cpus):
    placement = place(None, None, None, 4, machine(float(cpus)))
    assert total(placement, "num_cpus") <= cpus
    assert 4 % placement.ranks == 0


def test_each_rank_gets_a_whole_gpu_where_there_are_enough():
    placement = place(None, None, None, 8, machine(64.0, 8.0))
    assert placement.rank_options["num_gpus"] == 1
    assert total(placement, "num_gpus") <= 8
    alone = place(None, None, None, 8, machine(8.0, 1.0))
    assert total(alone, "num_gpus") <= 1


@pytest.mark.parametrize("gpus", range(1, 9))
def test_gpu_fractions_pack_onto_single_devices(gpus):
    placement = place(None, None, None, 16, machine(64.0, float(gpus)))
    shares = [placement.rank_options["num_gpus"]] * placement.ranks
    shares += [placement.sampler_options["num_gpus"]] * (placement.samplers + placement.scorers)
    free = [1.0] * gpus
    for share in sorted(shares, reverse=True):
        device = max(range(gpus), key=free.__getitem__)
        free[device] -= share
        assert free[device] >= -1e-9


def test_what_cannot_be_placed_is_refused():
    with pytest.raises(PlacementError, match="CPU"):
        place(1, 1, 1, 1, [])
    with pytest.raises(PlacementError, match=r"learner\.ranks"):
        place(1, 1, 3, 4, machine(8.0))


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
    placement = place(2, 2, 2, 4, machine(16.0, 8.0), each)
    options = placement.sampler_options, placement.scorer_options, placement.rank_options
    got = tuple(option.get("num_gpus", 0) for option in options)
    assert total(placement, "num_gpus") <= 8
    assert got == expected


def test_more_gpus_than_there_are_is_refused_with_the_sum():
    with pytest.raises(PlacementError, match=r"2 x 2 \+ 1 x 1 \+ 2 x 4 = 13 GPUs asked for, the cluster has 8"):
        place(2, 1, 2, 4, machine(16.0, 8.0), (2, 1, 4))
    with pytest.raises(PlacementError, match="the cluster has 0"):
        place(2, 1, 2, 4, machine(16.0), (None, None, 1))


def test_a_gpu_model_without_gpus_is_refused(small_config):
    with pytest.raises(PlacementError, match="cuda was asked for"):
        place_for(small_config("model.device=cuda"), machine(2.0))
    on_cpu = place_for(small_config("model.device=cpu"), machine(2.0, 8.0))
    assert total(on_cpu, "num_gpus") == 0


def test_one_gpu_and_a_half_is_refused():
    with pytest.raises(PlacementError, match=r"sampler\.gpus: 1\.5 is neither"):
        place(2, 1, 2, 4, machine(16.0, 8.0), (1.5, None, None))


def test_a_share_fits_on_single_nodes():
    """Three CPUs of which no two are on the node that samplers must go to."""
    nodes = several((1.0, 0.0, {"kind": "small"}), (2.0, 0.0, {}))
    assert place(2, 1, 1, 4, nodes).sampler_options["num_cpus"] == 0.5
    placement = place(3, 1, 1, 4, nodes, labels=({"kind": "small"}, {}, {}))
    assert placement.sampler_options["num_cpus"] == pytest.approx(1 / 3, abs=1e-3)
    halves = several((0.5, 0.0, {}), (0.5, 0.0, {}), (0.5, 0.0, {}))
    assert place(1, 1, 1, 4, halves).sampler_options["num_cpus"] <= 0.5
    with pytest.raises(PlacementError, match="do not fit on single nodes"):
        place(1, 1, 1, 4, several((4.0, 2.0, {}), (4.0, 2.0, {})), (4, 0, 0))
    with pytest.raises(PlacementError, match="do not fit on single nodes"):  # two thirds of a GPU leave a third unused
        place(3, 1, 1, 4, machine(8.0, 2.0), (0.6, 0, 0))


@pytest.mark.parametrize(
    ("selector", "meant"),
    [
        ({"kind": "a100"}, [1]),
        ({"kind": "!a100"}, [2, 3]),
        ({"kind": "in(a100,cpu)"}, [1, 2]),
        ({"kind": "!in(a100,cpu)"}, [3]),
        ({"kind": "a10"}, []),
        ({"kind": "a100", "market": "spot"}, []),
        ({}, [1, 2, 3]),
    ],
)
def test_labels_mean_what_they_mean_to_ray(selector, meant):
    nodes = several((4.0, 2.0, {"kind": "a100"}), (4.0, 0.0, {"kind": "cpu"}), (4.0, 0.0, {}))
    assert [i for i, node in enumerate(nodes, 1) if node.matches(selector)] == meant


def test_a_label_that_no_node_has_is_said_at_once_unless_nodes_will_come(small_config):
    nodes = several((4.0, 0.0, {"kind": "cpu"}))
    config = small_config('sampler.labels={kind: "in(a100, h100)"}')
    with pytest.raises(PlacementError) as caught:
        place_for(config, nodes)
    assert "sampler.labels: no node has {'kind': 'in(a100,h100)'}" in str(caught.value)
    assert "node 10.0.0.1: 4 CPU" in str(caught.value) and "labels {'kind': 'cpu'}" in str(caught.value)
    coming = small_config('sampler.labels={kind: "in(a100, h100)"}', "run.autoscale=true", "sampler.gpus=1")
    placement = place_for(coming, nodes)
    assert placement.sampler_options["num_gpus"] == 1
    assert placement.sampler_options["label_selector"] == {"kind": "in(a100,h100)"}


@pytest.mark.parametrize("wrong", ["in()", "!!a", "in(a", "-a", "a b"])
def test_what_is_no_label_selector_is_refused(wrong, small_config):
    with pytest.raises(ConfigError, match=r"reward\.labels: .*expected a node label's value as VALUE, !VALUE, in"):
        small_config(f'reward.labels={{kind: "{wrong}"}}')


def test_samplers_on_nodes_without_gpus_get_none():
    nodes = several((8.0, 2.0, {"kind": "gpu"}), (8.0, 0.0, {"kind": "cpu"}))
    placement = place(None, None, None, 4, nodes, labels=({"kind": "cpu"}, {"kind": "cpu"}, {"kind": "gpu"}))
    assert "num_gpus" not in placement.sampler_options and "num_gpus" not in placement.scorer_options
    assert placement.rank_options["num_gpus"] == 1 and placement.rank_labels == {"kind": "gpu"}


def test_automatic_counts_are_those_of_the_nodes_that_a_role_may_use():
    nodes = several(*[(8.0, 1.0, {"kind": "a"})] * 3, (8.0, 1.0, {"kind": "b"}))
    placement = place(None, None, None, 4, nodes, labels=({"kind": "b"}, {}, {}))
    assert (placement.samplers, placement.ranks) == (1, 2)
    placement = place(None, None, None, 4, nodes, labels=({}, {}, {"kind": "b"}))
    assert (placement.samplers, placement.ranks) == (3, 1)


AUTOMATIC = ("learner.ranks=1", "sampler.actors=null", "reward.actors=null")
CPU_NODES = several((2.0, 0.0, {}), (2.0, 0.0, {}), (2.0, 0.0, {}))


def test_automatic_counts_follow_the_nodes_and_given_ones_stay_while_they_fit(small_config):
    config = small_config(*AUTOMATIC)
    start = place_for(config, CPU_NODES)
    assert (start.samplers, start.scorers) == counts_now(config, start, CPU_NODES) == (3, 1)
    assert counts_now(config, start, CPU_NODES[:2]) == (2, 1)
    assert counts_now(config, start, CPU_NODES[:1]) == (1, 1)
    assert counts_now(config, start, [*CPU_NODES, *several((1.0, 0.0, {}))]) == (4, 1)
    assert counts_now(config, start, [*CPU_NODES, *CPU_NODES]) == (7, 2)
    fixed = small_config(*AUTOMATIC, "sampler.actors=3")
    start = place_for(fixed, CPU_NODES)
    assert counts_now(fixed, start, [*CPU_NODES, *CPU_NODES]) == (3, 2)
    assert counts_now(fixed, start, CPU_NODES[:1]) == (1, 1)  # or one role would starve the other
    assert counts_now(fixed, start, []) == (1, 1)


def test_a_node_that_the_samplers_may_not_use_changes_nothing(small_config):
    nodes = several((4.0, 0.0, {"kind": "learner"}), (4.0, 0.0, {"kind": "sampler"}))
    labels = ("learner.labels={kind: learner}", "sampler.labels={kind: sampler}", "reward.labels={kind: sampler}")
    config = small_config(*AUTOMATIC, *labels)
    start = place_for(config, nodes)
    assert counts_now(config, start, [*nodes, *several((8.0, 0.0, {"kind": "learner"}))]) == (start.samplers, 2)
    assert counts_now(config, start, [*nodes, *several((4.0, 0.0, {"kind": "sampler"}))])[0] > start.samplers


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_joined_gpus_are_used_and_never_more_than_there_are(small_config, gpus):
    config = small_config(*AUTOMATIC, "model.device=auto")
    nodes = several((32.0, 4.0, {}))
    start = place_for(config, nodes)
    more = [*nodes, *several((32.0, float(gpus), {}))]
    samplers, scorers = counts_now(config, start, more)
    assert samplers > start.samplers
    used = start.ranks * start.rank_options["num_gpus"] + (samplers + scorers) * start.sampler_options["num_gpus"]
    assert used <= 4 + gpus


@pytest.fixture(scope="module")
def cluster():
    """A head, two nodes with GPUs (as they say) and one without, each of 4 CPUs."""
    folder, store = tempfile.mkdtemp(prefix="tr-", dir="/tmp"), {"object_store_memory": 80 * 2**20, "num_cpus": 4}
    made = Cluster(
        initialize_head=True,
        head_node_args={**store, "temp_dir": folder, "include_dashboard": False, "labels": {"kind": "head"}},
    )
    for _ in range(2):
        made.add_node(**store, num_gpus=2, labels={"kind": "gpu"})
    made.add_node(**store, labels={"kind": "cpu"})
    ray.init(address=made.address, namespace="tributary", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def eventually(condition) -> None:
    """Of the nodes alive: Ray collects what is free now and then."""
    deadline = time.monotonic() + 20
    while not condition(nodes := alive_nodes()):
        assert time.monotonic() < deadline, listed(nodes)
        time.sleep(0.1)


def where_class() -> type:
    """Made on the spot, so that Ray sends it whole: its workers do not find this file."""

    class Where:
        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

    return Where


@pytest.fixture
def kinds(cluster):
    """Start actors with these options; the kinds of nodes that they are on."""
    started = []

    def go(*options: dict) -> Counter:
        by_id = {node.id: node.labels["kind"] for node in alive_nodes()}
        actors = [ray.remote(where_class()).options(**each).remote() for each in options]
        started.extend(actors)
        return Counter(by_id[node] for node in ray.get([actor.node.remote() for actor in actors], timeout=60))

    yield go
    for actor in started:
        ray.kill(actor)
    eventually(lambda nodes: all(node.free_cpus == node.cpus for node in nodes))


def test_the_nodes_are_told_with_what_is_free(kinds):
    assert [(node.cpus, node.gpus, node.labels["kind"]) for node in sorted(alive_nodes(), key=str)].count(
        (4.0, 2.0, "gpu")
    ) == 2
    kinds({"num_cpus": 3, "label_selector": {"kind": "cpu"}})
    eventually(lambda nodes: "4 CPU (1 free), 0 GPU (0 free), labels {'kind': 'cpu'}" in listed(nodes))


def test_reward_actors_without_gpus_go_to_nodes_without_while_there_is_room(kinds):
    placement = place(4, 8, 2, 8, alive_nodes(), (0.5, 0, 1))
    assert placement.scorer_options["num_cpus"] == 1
    assert not kinds(*[placement.scorer_options] * 8)["gpu"]
    assert kinds(*[placement.scorer_options] * 2)["gpu"] == 2  # nothing else is left: better there than nowhere


def test_samplers_are_spread_over_the_nodes_of_their_labels(kinds):
    placement = place(4, 1, 1, 8, alive_nodes(), (0.5, 0, 0), ({"kind": "!head"}, {}, {}))
    assert kinds(*[placement.sampler_options] * 4) == {"gpu": 4}
    placement = place(3, 1, 1, 8, alive_nodes(), (0, 0, 0), ({"kind": "in(cpu,gpu)"}, {}, {}))
    del placement.sampler_options["fallback_strategy"]
    spread = {**placement.sampler_options, "label_selector": {"kind": "in(cpu,gpu)"}}
    assert kinds(*[spread] * 3) == {"gpu": 2, "cpu": 1}


def test_learner_ranks_are_packed_where_their_labels_say(kinds):
    placement = place(1, 1, 2, 8, alive_nodes(), (0, 0, 1), ({}, {}, {"kind": "gpu"}))
    group = reserve(placement, 20)
    try:
        assert kinds(*in_group(placement, group)) == {"gpu": 2}
        eventually(lambda nodes: sorted(node.free_gpus for node in nodes if node.gpus) == [0, 2])
    finally:
        ray.util.remove_placement_group(group)
    placement = place(1, 1, 2, 8, alive_nodes(), (0, 0, 1), ({}, {}, {"kind": "tpu"}), autoscale=True)
    with pytest.raises(DeadlineExceeded) as caught:
        reserve(placement, 1)
    assert "run.ready_seconds=1: still waiting for room for 2 learner ranks" in str(caught.value)
    assert "1 GPU, labels {'kind': 'tpu'} each" in str(caught.value)


def test_a_late_start_says_what_is_asked_and_what_is_there(cluster):
    options = {"num_cpus": 3, "num_gpus": 1, "label_selector": {"kind": "gpu"}}
    actors = [ray.remote(where_class()).options(**options).remote() for _ in range(3)]
    try:
        with pytest.raises(DeadlineExceeded) as caught:
            ready([Asked("samplers", options, [actor.node.remote() for actor in actors])], time.monotonic() + 5, 5)
    finally:
        for actor in actors:
            ray.kill(actor)
    said = str(caught.value)
    assert "run.ready_seconds=5: still waiting for 1 of 3 samplers (3 CPU, 1 GPU, labels {'kind': 'gpu'} each)" in said
    assert said.count("4 CPU (1 free), 2 GPU (1 free), labels {'kind': 'gpu'}") == 2
    assert asks(options) in said and len(said.split("node ")) == 5


def test_nodes_that_are_not_told_are_waited_for_no_longer_than_said(cluster, monkeypatch):
    silent = threading.Event()
    monkeypatch.setattr(cluster_nodes, "get_cluster_status", lambda address: silent.wait(30))
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"control store at .* did not answer within 0\.2 s"):
        alive_nodes(0.2)
    assert time.monotonic() - start < 2
    silent.set()
