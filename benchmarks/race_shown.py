"""A race (race.py) as tables and a picture, and the same calls at the size of public models."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")  # no display on a server
import numpy as np
from matplotlib.figure import Figure

from commands.plan import Costs
from evaluation.metrics import student_interval

Point = Mapping[str, float]  # one judgement: `reward`, and what had been spent by then
Curves = Mapping[str, Sequence[Point]]  # of a seed, by entry
SPENT = {"seconds": "seconds", "gflop": "GFLOP", "trajectories": "trajectories", "decodes": "reward calls"}


class Size(NamedTuple):
    """What a sample costs, and how many pass the network under guidance."""

    cost: Costs
    passes: int


def reached(curve: Sequence[Point], reward: float) -> dict[str, float] | None:
    """What had been spent where the curve first is at this reward, by straight lines between its points; None: it is
    nowhere."""
    if curve[0]["reward"] >= reward:
        return dict(curve[0])
    for before, after in itertools.pairwise(curve):
        if after["reward"] >= reward:
            share = (reward - before["reward"]) / (after["reward"] - before["reward"])
            return {key: before[key] + share * (after[key] - before[key]) for key in before}
    return None


def flops(spent: Point, size: Size) -> float:
    """Of the calls counted, at this size. Back to the latents a decode or a reward costs as much as there; what a fit
    without network costs is not counted."""
    cost, passes = size
    picture = cost.decode + (cost.reward or 0.0)
    return (
        (passes * spent["guided"] + spent["single"]) * cost.unet
        + (passes * spent["guided_train"] + spent["single_train"]) * cost.unet_train
        + (spent["decode"] + 2 * spent["decode_train"]) * picture
        + spent["flow"] * cost.flow + spent["flow_train"] * cost.flow_train
    )  # fmt: skip


def figures(point: Point, size: Size) -> dict[str, float]:
    decodes = point["decode"] + point["decode_train"]
    return {**point, "gflop": flops(point, size) / 1e9, "decodes": decodes}


def rows(seeds: Sequence[Curves], usual: str, published: str, size: Size) -> list[dict[str, Any]]:
    """A line an entry: of each figure the mean over the seeds that reach (b)'s end, with its 95 % interval, and each
    seed's own; None: not reached. Ratios are seed by seed; to what the published algorithm had spent at its end where
    it never arrives, which `at_most` then says."""
    ends = [curves[usual][-1]["reward"] for curves in seeds]
    result = []
    for name in seeds[0]:
        arrived = [reached(curves[name], end) for curves, end in zip(seeds, ends, strict=True)]
        line: dict[str, Any] = {
            "name": name, "seeds": len(seeds), "reached": sum(one is not None for one in arrived),
            "spent": [curves[name][-1]["seconds"] for curves in seeds], "points": arrived,
            "best": [max(point["reward"] for point in curves[name]) for curves in seeds], "wanted": ends,
        }  # fmt: skip
        for key in SPENT:
            line[key] = mean([figures(one, size)[key] for one in arrived if one])
        for key, other in (("to_usual", usual), ("to_published", published)):
            line[key], line[f"{key}_at_most"] = _against([curves.get(other) for curves in seeds], arrived, ends)
        result.append(line)
    return result


def _against(
    others: Sequence[Sequence[Point] | None], arrived: Sequence[Point | None], ends: Sequence[float]
) -> tuple[tuple[float, float | None, float | None] | None, bool]:
    """Mean ratio of the seconds, and whether the other has not arrived somewhere. Without seeds where one of them is
    missing, or the other was there before it began."""
    ratios, at_most = [], False
    for curve, one, end in zip(others, arrived, ends, strict=True):
        if curve and one:
            theirs = reached(curve, end)
            if whole := (theirs or curve[-1])["seconds"]:
                ratios.append(one["seconds"] / whole)
                at_most |= theirs is None
    return mean(ratios), at_most


def mean(values: Sequence[float]) -> tuple[float, float | None, float | None] | None:
    """With its 95 % interval over seeds; None of nothing."""
    if not values:
        return None
    if len(values) == 1:
        return values[0], None, None
    low, high = student_interval(np.array(values, np.float64), np.zeros(len(values), int))
    return float(np.mean(values)), low, high


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, as ENTRIES has them."""

    def cell(found: Sequence[float | None] | None, at_most: bool = False) -> str:
        if found is None:
            return "-"
        value, low, high = found
        shown = f"{'<= ' * at_most}{value:.3g}"
        return shown if low is None else f"{shown} [{low:.3g}, {high:.3g}]"

    heads = ["seconds, published's = 1", "seconds, DDPO's = 1"]
    head = ["entry", "reached", *SPENT.values(), *heads, "best reward, a seed each"]
    out = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line in lines:
        count = f"{line['reached']} of {line['seeds']}"
        if line["reached"] < line["seeds"]:
            count += f" (in {min(line['spent']):.0f} to {max(line['spent']):.0f} s)"
        cells = [line["name"], count, *(cell(line[key]) for key in SPENT)]
        cells += [cell(line[key], line[f"{key}_at_most"]) for key in ("to_published", "to_usual")]
        out.append(f"| {' | '.join([*cells, ' '.join(f'{best:.2f}' for best in line['best'])])} |")
    return "\n".join(out) + "\n"


def sizes_table(lines: Sequence[Mapping[str, Any]], sizes: Mapping[str, Size]) -> str:
    """PFLOP until the reward is reached, of the calls counted, at these sizes: means over the seeds that reach it."""
    out = [f"| PFLOP | {' | '.join(sizes)} |", "|---" * (1 + len(sizes)) + "|"]
    for line in lines:
        arrived = [one for one in line["points"] if one]
        cells = [f"{np.mean([flops(one, size) for one in arrived]) / 1e15:.3g}" if arrived else "-"
                 for size in sizes.values()]  # fmt: skip
        out.append(f"| {line['name']} | {' | '.join(cells)} |")
    return "\n".join(out) + "\n"


def picture(seeds: Sequence[Curves], usual: str) -> Figure:
    """Reward against seconds, a line a seed; what is to be reached is dashed."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    ax = figure.subplots()
    for curves in seeds:
        for index, (name, curve) in enumerate(curves.items()):
            label = name if curves is seeds[0] else None
            seconds, rewards = [point["seconds"] for point in curve], [point["reward"] for point in curve]
            ax.plot(seconds, rewards, color=f"C{index}", marker=".", linewidth=1, label=label)
        ax.axhline(curves[usual][-1]["reward"], color="0.6", linestyle="--", linewidth=0.8, zorder=0)
    ax.set_xscale("symlog", linthresh=10)
    ax.set_xlim(left=0)
    ax.set_xlabel("seconds of one core (log from 10 on), judgements left out")
    ax.set_ylabel("mean reward of the fixed noise")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=8)
    return figure
