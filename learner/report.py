"""report.html of a run: one file with everything in it, made from the durable records alone.

`python -m learner.report RUN` makes it anew; a run does so at every evaluation and at its end.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import matplotlib
import yaml

matplotlib.use("Agg")  # no display on a server
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from learner.config import Config
from learner.records import BEFORE, Records
from learner.statistics import mean_of_good, paired_interval
from learner.storage import Storage

FILE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
INK = "#7a7f87"  # legible on light and on dark
COLOURS = ("#2f7ed8", "#e07b39", "#3a9d6e")

# Title, unit, and the metrics of metrics.jsonl with their labels.
CURVES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Reward", "raw reward", {"reward_mean": "training rollouts, mean", "eval_reward_mean": "fixed images"}),
    ("Loss", "", {"loss": "the objective's", "flow_loss": "flow-only fits"}),
    ("Parts of the loss", "", {"forward_loss": "forward", "reverse_loss": "reverse", "terminal_loss": "terminal"}),
    ("Clipped", "share of transitions", {"clipped": "ratio outside of the clip"}),
    ("Step size", "nats a transition", {"kl": "KL, rollout policy to the one being updated"}),
    ("Gradient norm before clipping", "", {"grad_norm": "LoRA", "flow_grad_norm": "flow network"}),
)
PARTS = {"sample_seconds": "sampling", "score_seconds": "scoring", "train_seconds": "training"}


def render(records: Records, config: Config) -> bytes:
    """The page. Works at any time of a run, with whatever is there."""
    lines, evaluated = records.lines, records.evaluated()
    trained = [line for line in lines if line["epoch"] != BEFORE]
    curves = [
        (title, svg)
        for title, unit, names in CURVES
        if (svg := _curve([(label, _points(lines, name)) for name, label in names.items()], unit))
    ]
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return page.render(
        name=records.about["name"],
        about=records.about,
        place=str(records.storage),
        made=time.strftime("%Y-%m-%d %H:%M %Z"),
        begun=time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(records.about["created"])),
        config=config,
        epochs=len(trained),
        trajectories=sum(line["trajectories"] for line in trained),
        lost=sum(line.get("lost_trajectories", 0) for line in trained),
        headline=_headline(records, evaluated),
        curves=curves,
        sheets=[(label, _data(records.sheet(epoch))) for label, epoch in _sheets(evaluated)],
        timings=_timings(trained, config.run.runner == "ray"),
        timing_curve=_curve([(label, _points(trained, name)) for name, label in PARTS.items()], "seconds"),
        settings=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
    ).encode()


def _headline(records: Records, evaluated: Sequence[int]) -> dict[str, Any] | None:
    """Evaluated reward before and after, with its interval."""
    if len(evaluated) < 2 or evaluated[0] != BEFORE:
        return None
    before, after = (records.evaluation_rewards(epoch) for epoch in (BEFORE, evaluated[-1]))
    low, high = paired_interval(before, after)
    return {
        "before": mean_of_good(before), "after": mean_of_good(after), "gain": mean_of_good(after - before), "low": low,
        "high": high, "images": len(after), "epoch": evaluated[-1] + 1,
    }  # fmt: skip


def _sheets(evaluated: Sequence[int]) -> list[tuple[str, int]]:
    if not evaluated:
        return []
    ends = [("Before training", evaluated[0])] if evaluated[0] == BEFORE else []
    return ends + ([(f"After epoch {evaluated[-1] + 1}", evaluated[-1])] if evaluated[-1] != BEFORE else [])


def _timings(trained: Sequence[dict[str, Any]], overlap: bool) -> list[tuple[str, float, float]]:
    """(what, median seconds an epoch, share of the epoch): the first epoch, with its warm-up, is no measure."""
    if not trained:
        return []
    usual = {name: median(line[name] for line in trained) for name in (*PARTS, "seconds")}
    parts = usual["sample_seconds"], usual["score_seconds"]
    busy = (max(parts) if overlap else sum(parts)) + usual["train_seconds"]
    names = ("all trajectories sampled after", "all scored after") if overlap else ("sampling", "scoring")
    rows = list(zip(names, parts, strict=True))
    rows += [("training", usual["train_seconds"]), ("evaluation and the rest", max(0.0, usual["seconds"] - busy))]
    return [(what, value, value / usual["seconds"]) for what, value in rows]


def _points(lines: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(epochs done, value) where there is one."""
    return [(line["epoch"] + 1, line[name]) for line in lines if line.get(name) is not None]


def _curve(series: Sequence[tuple[str, list[tuple[int, float]]]], unit: str) -> str | None:
    """SVG text of one diagram over the epochs, or None without data."""
    series = [(label, points) for label, points in series if points]
    if not series:
        return None
    figure = Figure(figsize=(6, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for colour, (label, points) in zip(COLOURS, series, strict=False):
        marker = "o" if len(points) < 15 else None
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, markersize=4, linewidth=1.8)
    axes.set_xlabel("epochs", color=INK)
    axes.set_ylabel(unit, color=INK)
    axes.tick_params(colors=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(INK)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m learner.report", description="Make a run's report.html anew.")
    parser.add_argument("run", help="run directory or URL")
    args = parser.parse_args(arguments)
    try:
        storage = Storage(args.run)
        records = Records.open(storage)
        storage.write(FILE, render(records, records.config()))
    except (OSError, ValueError) as error:
        print(f"learner.report: {args.run}: {error}", file=sys.stderr)
        return 2
    print(f"{storage}/{FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
