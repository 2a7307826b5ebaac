"""Actors placed on nodes as Ray has them: a head, two nodes with GPUs (as they say) and one without."""

import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import ray
from ray_nodes import cluster_of
from ray_processes import wait_for
from test_placement import place

from cluster import nodes as cluster_nodes
from cluster.nodes import alive_nodes, listed
from cluster.placement import Share, in_group, ready, reserve
from diffusion.failures import DeadlineExceeded

pytestmark = [pytest.mark.ray, pytest.mark.long]


@pytest.fixture(scope="module")
def cluster():
    """Each node has 4 CPUs."""
    node = {"object_store_memory": 80 * 2**20, "num_cpus": 4}
    gpus, head = {**node, "num_gpus": 2, "labels": {"kind": "gpu"}}, {**node, "labels": {"kind": "head"}}
    with cluster_of({**head, "include_dashboard": False}, gpus, gpus, {**node, "labels": {"kind": "cpu"}}) as made:
        ray.init(address=made.address, namespace="tributary", log_to_driver=False)
        yield made
        ray.shutdown()


def eventually(condition) -> None:
    """Of the nodes alive: Ray collects what is free now and then."""
    wait_for(lambda: condition(alive_nodes()), 20, lambda: listed(alive_nodes()))


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
    assert Counter((node.cpus, node.gpus, node.labels["kind"]) for node in alive_nodes())[4.0, 2.0, "gpu"] == 2
    kinds({"num_cpus": 3, "label_selector": {"kind": "cpu"}})
    eventually(lambda nodes: "4 CPU (1 free), 0 GPU (0 free), labels {'kind': 'cpu'}" in listed(nodes))


def test_reward_actors_without_gpus_go_to_nodes_without_while_there_is_room(kinds):
    placement = place((4, 8, 2), alive_nodes(), gpus=(0.5, 0, 1))
    assert placement.scorers.cpus == 1
    assert not kinds(*[placement.scorers.spread] * 8)["gpu"]
    assert kinds(*[placement.scorers.spread] * 2)["gpu"] == 2  # nothing else is left: better there than nowhere


def test_samplers_are_spread_over_the_nodes_of_their_labels(kinds):
    placement = place((4, 1, 1), alive_nodes(), gpus=(0.5, 0, 0), labels=({"kind": "!head"}, {}, {}))
    assert kinds(*[placement.samplers.spread] * 4) == {"gpu": 4}
    placement = place((3, 1, 1), alive_nodes(), gpus=(0, 0, 0), labels=({"kind": "in(cpu,gpu)"}, {}, {}))
    assert kinds(*[replace(placement.samplers, last=()).spread] * 3) == {"gpu": 2, "cpu": 1}


def test_learner_ranks_are_packed_where_their_labels_say(kinds):
    placement = place((1, 1, 2), alive_nodes(), gpus=(0, 0, 1), labels=({}, {}, {"kind": "gpu"}))
    group = reserve(placement, 20)
    try:
        assert kinds(*in_group(placement, group)) == {"gpu": 2}
        eventually(lambda nodes: sorted(node.free_gpus for node in nodes if node.gpus) == [0, 2])
    finally:
        ray.util.remove_placement_group(group)
    placement = place((1, 1, 2), alive_nodes(), "run.autoscale=true", gpus=(0, 0, 1), labels=({}, {}, {"kind": "tpu"}))
    with pytest.raises(DeadlineExceeded) as caught:
        reserve(placement, 1)
    assert "run.ready_seconds=1: still waiting for room for 2 learner ranks" in str(caught.value)
    assert "1 GPU, labels {'kind': 'tpu'} each" in str(caught.value)


def test_a_late_start_says_what_is_asked_and_what_is_there(cluster):
    share = Share(3, 3, 1, {"kind": "gpu"})
    actors = [ray.remote(where_class()).options(**share.spread).remote() for _ in range(3)]
    try:
        with pytest.raises(DeadlineExceeded) as caught:
            ready({"samplers": (share, [actor.node.remote() for actor in actors])}, time.monotonic() + 5, 5)
    finally:
        for actor in actors:
            ray.kill(actor)
    said = str(caught.value)
    assert "run.ready_seconds=5: still waiting for 1 of 3 samplers (3 CPU, 1 GPU, labels {'kind': 'gpu'} each)" in said
    assert said.count("4 CPU (1 free), 2 GPU (1 free), labels {'kind': 'gpu'}") == 2
    assert str(share) in said and len(said.split("node ")) == 5


def test_nodes_that_are_not_told_are_waited_for_no_longer_than_said(cluster, monkeypatch):
    silent = threading.Event()
    monkeypatch.setattr(cluster_nodes, "get_cluster_status", lambda address: silent.wait(60))
    with pytest.raises(DeadlineExceeded, match=r"control store at .* did not answer within 0\.2 s"):
        alive_nodes(0.2)
    assert not silent.is_set()
    silent.set()
