"""What a run tells Prometheus: scraped from Ray's own endpoint, as a Prometheus server would."""

import json
import re
import time
import urllib.request
from dataclasses import replace

import pytest
import ray
from emulated_run import SETTINGS, use_emulated_parts
from ray.util import list_named_actors
from test_metrics import VITALS, exported, without_ending

from actors.metrics import Metrics
from actors.rollouts import Rollouts
from learner.run import main

pytestmark = [pytest.mark.ray, pytest.mark.long]
TAGS = ("run", "role", "state", "stage", "outcome", "where", "error", "le")  # the others are the agent's


def scrape() -> dict[tuple, float]:
    """Our metrics by name and tags but the agent's own."""
    (port,) = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    values = {}
    for name, tags, value in re.findall(r"^(ray_tributary_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        own = [pair for pair in re.findall(r'(\w+)="([^"]*)"', tags) if pair[0] in TAGS]
        values[name, *sorted(own)] = float(value)
    return values


def of(values, name: str, run: str, **tags: str) -> float | None:
    return values.get((f"ray_tributary_{name}", *sorted({"run": run, **tags}.items())))


def wait_for(condition, seconds: float = 40):
    deadline = time.monotonic() + seconds
    while not condition(values := scrape()):
        assert time.monotonic() < deadline, values
        time.sleep(0.5)
    return values


@pytest.fixture(scope="module", autouse=True)
def often():
    """Ray's agents hear every half second, not every 10."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_metrics_report_interval_ms", "500")
        yield


@pytest.fixture
def settings(often, cluster, tmp_path, monkeypatch):
    """Of three epochs of 16 emulated trajectories in chunks of 4, named `mine`."""
    use_emulated_parts(monkeypatch, sample_seconds=0.1)
    return [*SETTINGS, "learner.ranks=1", f"run.dir={tmp_path / 'mine'}"]


def test_gauges_appear_and_each_run_has_its_own(settings):
    Metrics("first").show(VITALS)
    Metrics("second").show(replace(VITALS, policy_version=3))
    values = wait_for(lambda values: of(values, "policy_version", "second") == 3)
    assert of(values, "policy_version", "first") == 7
    assert of(values, "chunks", "first", role="sampler", state="waiting") == 5
    assert of(values, "chunks", "first", role="sampler", state="running") == 3
    assert of(values, "staleness_mean", "first") == 0.5 and of(values, "staleness_max", "first") == 1
    assert of(values, "reward_mean", "first") is None  # nothing is trained yet


class Stranger:
    """Another run's actor, of a name that the run will want."""


def names() -> set[str]:
    actors = list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in actors if actor["namespace"] != "tributary"}


def test_a_run_is_measured_and_its_actors_have_names(settings, tmp_path, monkeypatch):
    """The second epoch costs a sampler with work in hand."""
    real, before, end = Rollouts.pause, set(), set()

    def wait(self, also=()):
        if self.buffer.closed == 1 and not before and self.samplers.load()[1]:
            before.update(names())
            ray.kill(next(actor for actor, calls in self.samplers.calls.items() if calls))
        if self.buffer.closed == 2:
            end.update(names())
        real(self, also)

    monkeypatch.setattr(Rollouts, "pause", wait)
    stranger = ray.remote(Stranger).options(name="mine/sampler-1", num_cpus=0).remote()
    assert main(settings) == 0
    assert names() == set()
    ray.kill(stranger)
    assert before == {"mine/scorer-1", "mine/learner-1", "mine/sampler-1", "mine/sampler-2"}
    assert "mine/sampler-3" in end and len(end) == 4
    lines = [json.loads(line) for line in (tmp_path / "mine/metrics.jsonl").read_text().splitlines()]
    lost = sum(line.get("lost_trajectories", 0) for line in lines) / 4
    assert lost >= 1

    def shown(values) -> tuple:
        """Ray sends the counters apart from the gauges."""
        trained, scored = (of(values, "trajectories_total", "mine", stage=stage) for stage in ("trained", "scored"))
        return trained, scored, of(values, "policy_version", "mine"), of(values, "actors", "mine", role="learner")

    chunks = 3 * 4 + len(list((tmp_path / "mine/evaluation").glob("*.parquet")))
    values = wait_for(lambda values: shown(values) == (48, 4 * chunks, 3, 1))
    assert of(values, "receipts_total", "mine", outcome="verified") == chunks
    assert of(values, "chunk_seconds_count", "mine", role="sampler") == chunks
    assert of(values, "chunk_seconds_sum", "mine", role="sampler") > chunks * 0.1
    assert of(values, "lost_chunks_total", "mine", where="sampler") == lost
    assert of(values, "failures_total", "mine", role="sampler", error="ActorDied") == 1
    assert (of(values, "policy_version", "mine"), of(values, "epochs_in_work", "mine")) == (3, 0)
    assert of(values, "reward_mean", "mine") == pytest.approx(lines[-1]["reward_mean"])
    assert of(values, "train_seconds", "mine") == pytest.approx(lines[-1]["train_seconds"])
    assert of(values, "actors", "mine", role="scorer") == 1
    assert {without_ending(name) for name, *_ in values} <= exported()
