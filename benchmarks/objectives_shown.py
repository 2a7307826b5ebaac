"""The comparison of objectives (objectives.py) as a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display on a server
import numpy as np
from matplotlib.figure import Figure

from evaluation.metrics import student_interval

COLUMNS = {
    "tv": "TV to the target", "floor": "its floor", "of_target": "gain, target's = 1", "gap": "gap, nats",
    "nats": "nats from the base", "of_ideal": "gain, ideal tilt's at these nats = 1",
    "drift": "drift of the rest above its floor", "distance": "distance in a prompt, target's = 1",
    "per_trajectory": "gain per 1,000 trajectories", "per_flop": "gain per PFLOP", "per_second": "gain per hour",
}  # fmt: skip


def figures(one: Mapping[str, Any], attribute: str) -> dict[str, float | None]:
    """Of a run: learner.targets' figures and the certificate's, as the table has them."""
    target, certificate = one["target"], one["certificate"]
    reward, distance = target["reward"], target["distance"] or {}
    tv = next(law for law in target["attributes"] if law["name"] == attribute)["tv"]
    drifts = [law["drift"] for law in target["attributes"] if law["drift"] and law["drift"]["value"] is not None]
    gain = reward["value"] - reward["base"]
    return {
        "tv": tv["value"], "floor": tv["floor"], "gain": gain, "gap": certificate["gap"], "nats": certificate["nats"],
        "of_target": _ratio(gain, reward["target"] - reward["base"]),
        "of_ideal": _ratio(gain, certificate["ideal_gain"]),
        "drift": max((drift["value"] - drift["floor"] for drift in drifts), default=None),
        "distance": _ratio(distance.get("value"), distance.get("target")),
        "per_trajectory": _ratio(gain * 1e3, target["trajectories_trained"]),
        "per_flop": _ratio(gain * 1e15, one["flops"]), "per_second": _ratio(gain * 3600, target["seconds"]),
    }  # fmt: skip


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def row(name: str, found: Sequence[Mapping[str, Any]], attribute: str) -> dict[str, Any]:
    """A line of the table: of each figure the mean over the runs that have it, with its 95 % interval over seeds. And
    the runs' own points, nats and gain, for the picture."""
    good = [figures(one, attribute) for one in found if "failed" not in one]
    known = {key: [one[key] for one in good if one[key] is not None] for key in (good[0] if good else ())}
    numbers = {key: _mean(values) for key, values in known.items() if values}
    points = [(one["nats"], one["gain"]) for one in good if one["nats"] is not None]
    return {"name": name, "figures": numbers, "points": points, "runs": len(found), "failed": len(found) - len(good)}


def _mean(values: Sequence[Any]) -> tuple[float, float | None, float | None]:
    low, high = student_interval(np.array(values, np.float64), np.zeros(len(values), int))
    return float(np.mean(values)), None if math.isnan(low) else low, None if math.isnan(high) else high


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, least total variation first, what failed last."""

    def cell(figures: Mapping[str, Any], key: str) -> str:
        mean, low, high = figures.get(key, (None, None, None))
        return "-" if mean is None else f"{mean:.3g}" + ("" if low is None else f" [{low:.3g}, {high:.3g}]")

    ordered = sorted(rows, key=lambda each: each["figures"].get("tv", (math.inf,))[0])
    lines = [f"| objective | runs (failed) | {' | '.join(COLUMNS.values())} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for each in ordered:
        cells = " | ".join(cell(each["figures"], key) for key in COLUMNS)
        lines.append(f"| {each['name']} | {each['runs']} ({each['failed']}) | {cells} |")
    return "\n".join(lines) + "\n"


def pareto(
    rows: Sequence[Mapping[str, Any]], frontier: Sequence[tuple[float, float]], target: tuple[float, float]
) -> Figure:
    """Reward gained against nats spent, a mark for each seed, below the frontier of ideal tilts."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    ax = figure.subplots()
    ax.plot(*zip(*frontier, strict=True), color="0.5", label="ideal tilts of the base model")
    ax.plot(*target, marker="*", markersize=15, color="black", linestyle="", label="the target")
    for index, each in enumerate(each for each in rows if each["points"]):
        marker, colour = "os^v"[index // 10 % 4], f"C{index % 10}"
        ax.plot(*zip(*each["points"], strict=True), marker=marker, color=colour, label=each["name"], linestyle="")
    ax.set_xscale("symlog", linthresh=0.1)  # a maximiser is far away
    ax.set_xlim(left=0)
    ax.set_xlabel("nats from the base model (KL of paths; left is better)")
    ax.set_ylabel("gain in mean reward")
    ax.grid(alpha=0.25)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure
