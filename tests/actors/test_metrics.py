"""The metrics of a run, and the dashboard that shows them."""

import json
import re
from pathlib import Path

from ray.util.metrics import Counter, Gauge

from actors.metrics import METRICS, Metrics
from learner.protocol.runner import Vitals

DASHBOARD = Path(__file__).parents[2] / "cluster/deploy/grafana.json"
VITALS = Vitals(7, 2, (0.5, 1), {"sampler": 2}, {"sampler": 5}, {"sampler": 3})


def test_turns_are_many_and_gauges_are_set_once_a_second(monkeypatch):
    metrics, asked, clock = Metrics("any"), [], 1000.0
    monkeypatch.setattr("actors.metrics.time.monotonic", lambda: clock)

    def vitals() -> Vitals:
        asked.append(clock)
        return VITALS

    for _ in range(10):
        metrics.turn(vitals)
        metrics.turn(vitals)
        clock += 0.5
    assert asked == [1000.0, 1001.0, 1002.0, 1003.0, 1004.0]


def exported() -> set[str]:
    """The names of all metrics that there are."""
    return {f"ray_tributary_{name}" for name in METRICS}


def without_ending(name: str) -> str:
    """As in the code: Prometheus has its own endings for counters and histograms."""
    return re.sub("_(total|bucket|sum|count)$", "", name)


def test_the_dashboard_shows_every_metric_by_its_ending_and_no_other():
    """Ray's agent gives counters and histograms endings."""
    text = DASHBOARD.read_text()
    board = json.loads(text)
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    targets = [target["expr"] for panel in panels for target in panel["targets"]]
    assert {without_ending(name) for expr in targets for name in re.findall(r"\bray_\w+", expr)} == exported()
    assert all('run=~"$run"' in expr for expr in targets)
    variables = {variable["name"]: variable["type"] for variable in board["templating"]["list"]}
    assert variables == {"datasource": "datasource", "run": "query"}
    assert all(panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for panel in panels)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    endings = {Gauge: ("",), Counter: ("_total",)}
    for name, (kind, *_) in METRICS.items():
        for ending in re.findall(rf"ray_tributary_{name}(\w*)", text):
            assert ending in endings.get(kind, ("_bucket", "_sum", "_count"))
