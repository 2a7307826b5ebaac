"""What a run tells Prometheus: scraped from Ray's own endpoint, as a Prometheus server would."""

import json
import re
import tempfile
import time
import urllib.request
from dataclasses import replace

import pytest
import ray
from ray.util import list_named_actors
from test_metrics import VITALS, exported, without_ending

from actors.metrics import Metrics
from actors.ray_runner import RayRunner
from benchmarks import emulated
from cluster.session import Session
from diffusion.trajectory import Receipt
from learner import build
from learner.protocol.receipts import StaleWeights
from learner.run import main

pytestmark = [pytest.mark.ray, pytest.mark.long]
TAGS = ("run", "role", "state", "stage", "outcome", "where", "error", "le")  # the others are the agent's


def scrape() -> dict[str, dict[tuple, float]]:
    """Our metrics by name, and by their tags but the agent's own."""
    (port,) = [node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[tuple, float]] = {}
    for name, tags, value in re.findall(r"^(ray_tributary_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        pairs = re.findall(r'(\w+)="([^"]*)"', tags)
        own = tuple(sorted(pair for pair in pairs if pair[0] in TAGS))
        found.setdefault(name, {})[own] = float(value)
    return found


def of(found, name: str, run: str, **tags: str) -> float | None:
    return found.get(f"ray_tributary_{name}", {}).get(tuple(sorted({"run": run, **tags}.items())))


def wait_for(condition, seconds: float = 40):
    """Ray sends every 10 s."""
    deadline = time.monotonic() + seconds
    while not condition(found := scrape()):
        assert time.monotonic() < deadline, found
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def cluster():
    """A local Ray whose agents hear every half second, not every 10."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_metrics_report_interval_ms", "500")
        patched.setenv("RAY_TMPDIR", tempfile.mkdtemp(prefix="tr-", dir="/tmp"))
        session = Session(1)
        yield session
        session.close()


def test_gauges_appear_and_change_and_each_run_has_its_own(cluster):
    mine, other = Metrics("mine"), Metrics("other")

    def shown(found) -> list[float | None]:
        return [of(found, "policy_version", "mine"), of(found, "policy_version", "other")]

    mine.show(VITALS)
    other.show(replace(VITALS, policy_version=3))
    found = wait_for(lambda found: shown(found) == [7, 3])
    assert of(found, "chunks", "mine", role="sampler", state="waiting") == 5
    assert of(found, "chunks", "mine", role="sampler", state="running") == 3
    assert of(found, "staleness_mean", "mine") == 0.5 and of(found, "staleness_max", "mine") == 1
    assert of(found, "reward_mean", "mine") is None  # nothing is trained yet
    mine.show(replace(VITALS, policy_version=8))
    wait_for(lambda found: shown(found) == [8, 3])


def test_a_receipt_that_fails_is_counted_and_ends_the_run_all_the_same(cluster):
    metrics = Metrics("stale")
    with pytest.raises(StaleWeights), metrics.sampled(Receipt(0, "", (0.0, 0.0), (0.0, 0.0), "here", 1.0)):
        raise StaleWeights("not the published ones")
    found = wait_for(lambda found: of(found, "receipts_total", "stale", outcome="failed"))
    assert of(found, "failures_total", "stale", role="sampler", error="StaleWeights") == 1
    assert of(found, "receipts_total", "stale", outcome="verified") is None
    assert of(found, "trajectories_total", "stale", stage="sampled") is None


class Stranger:
    """Another run's actor, of a name that the run will want."""


@pytest.fixture
def run(cluster, tmp_path, monkeypatch):
    """Three epochs of 16 emulated trajectories in chunks of 4; the second one costs a sampler with work in hand.
    Returns the names of the actors alive before that, at the end, and after the run."""
    monkeypatch.setattr(
        build, "parts", lambda config, own_reward=None: emulated.parts(emulated.Emulation(sample_seconds=0.1))
    )
    real, names = RayRunner._wait, {}

    def named() -> set[str]:
        found = list_named_actors(all_namespaces=True)
        return {actor["name"] for actor in found if actor["namespace"] != "tributary"}

    def kills(self, waiting_on):
        version = self.snapshot.version if self.rollouts else 0
        if version == 1 and self.rollouts.samplers.running and "before" not in names:
            names["before"] = named()
            ray.kill(next(member.actor for member in self.rollouts.samplers._members if member.calls))
        if version == 3:
            names["end"] = named()
        real(self, waiting_on)

    monkeypatch.setattr(RayRunner, "_wait", kills)
    stranger = ray.remote(Stranger).options(name="mine/sampler-1", num_cpus=0).remote()
    settings = [
        "sampler.steps=2", "sampler.chunk_size=4", "train.trajectories=16", "train.epochs=3", "sampler.actors=2",
        "train.updates_per_epoch=1", "evaluation.images=4", "learner.ranks=1", "reward.actors=1",
        "mlflow.enabled=false", f"run.dir={tmp_path / 'mine'}",
    ]  # fmt: skip
    assert main(settings) == 0
    names["after"] = named()
    ray.kill(stranger)
    return names


def test_a_run_is_measured_and_its_actors_have_names(run, cluster, tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "mine/metrics.jsonl").read_text().splitlines()]
    lost = sum(line.get("lost_trajectories", 0) for line in lines) / 4
    assert lost >= 1

    def measured(found) -> bool:
        """All is trained, and the gauges of the end have come too: Ray sends them apart from the counters."""
        trained = of(found, "trajectories_total", "mine", stage="trained")
        return (trained, of(found, "policy_version", "mine")) == (48, 3) and of(found, "actors", "mine", role="learner")

    found = wait_for(measured)
    assert of(found, "trajectories_total", "mine", stage="scored") == 48 + 8  # with two evaluations
    assert (
        of(found, "receipts_total", "mine", outcome="verified")
        == of(found, "chunk_seconds_count", "mine", role="sampler")
        == 14
    )
    assert of(found, "chunk_seconds_sum", "mine", role="sampler") > 14 * 0.1
    assert of(found, "lost_chunks_total", "mine", where="sampler") == lost
    assert of(found, "failures_total", "mine", role="sampler", error="ActorDied") == 1
    assert (of(found, "policy_version", "mine"), of(found, "epochs_in_work", "mine")) == (3, 0)
    assert of(found, "reward_mean", "mine") == pytest.approx(lines[-1]["reward_mean"])
    assert of(found, "train_seconds", "mine") == pytest.approx(lines[-1]["train_seconds"])
    assert of(found, "actors", "mine", role="scorer") == 1
    assert {without_ending(name) for name in found} <= exported()
    fixed = {"mine/scorer-1", "mine/learner-1"}
    assert run["before"] == fixed | {"mine/sampler-1", "mine/sampler-2"}
    assert "mine/sampler-3" in run["end"] and len(run["end"]) == 4
    assert run["after"] == set()
