"""The report's diagrams: numbers in, SVG out, drawn by matplotlib. x counts epochs done (0: before training), of
bars the transitions.

Titles and labels, which may be anybody's words, are left to the template. The colours are the page's CSS variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reports.summary import Line

Interval = tuple[float, float, float]  # epochs done, low, high
WIDTH, HEIGHT = 400, 206  # of a diagram, in its own units
PLOT_AREA = (0.16, 0.19, 0.82, 0.74)  # left, bottom, width, height, as shares of the diagram
SMOOTHED_FROM = 10  # points; fewer are shown as they are
DOTS = 24  # at most, that are marked one by one
HUGE = 1e100  # no diagram can show it
# What matplotlib is told (black would be left out), and what the page says in its place.
COLOURS = {f"#00000{i}": f"var(--{name})" for i, name in enumerate(("c0", "c1", "c2", "c3", "line", "soft"), 1)}
*LINES, RULE, SOFT = COLOURS
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "tributary", "text.parse_math": False, "font.sans-serif": "DejaVu Sans",
    "font.size": 13, "figure.facecolor": "none", "axes.facecolor": "none",
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "axes.spines.bottom": False,
    "axes.grid": True, "axes.grid.axis": "y", "grid.color": RULE, "axes.axisbelow": True, "axes.labelcolor": SOFT,
    "axes.formatter.limits": (-4, 5), "axes.formatter.useoffset": False, "axes.xmargin": 0.01, "axes.ymargin": 0.06,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.color": SOFT, "ytick.color": SOFT, "lines.linewidth": 2,
    "path.simplify_threshold": 1.0,  # pixels: a long run's page stays small
}  # fmt: skip
# What goes of matplotlib's file: all around the drawing, a style for the whole page, ids that every drawing has,
# clipping (nothing reaches out), and decimals of a path beyond the first.
NOT_OURS = re.compile(
    r'^.*?<svg[^>]*>|</svg>\s*$|<defs>\s*<(?:style|clipPath).*?</defs>| id="[\w.]+_\d+"| clip-path="[^"]*"|\n *'
    r"|(?<=\.\d)\d+(?= )",
    re.DOTALL,
)


@dataclass(frozen=True)
class Diagram:
    """`svg` is what stands within an svg element of WIDTH x HEIGHT; `lines` are (label, last value) in the order of the
    colours c0 to c3; `window` is how many epochs the smoothed lines average over."""

    title: str
    unit: str
    svg: str
    lines: list[tuple[str, float]]
    window: int


def curves(
    title: str, unit: str, names: Mapping[str, str], lines: Sequence[Line], intervals: Sequence[Interval] = (),
    goal: float | None = None,
) -> Diagram | None:  # fmt: skip
    """Metrics over the epochs, by name with their labels, or None where there is no point. What is not finite is left
    out. Evaluations, which `intervals` are of, are few and of the same images: not smoothed. `goal`: what is aimed at,
    a dashed line. Equal numbers give equal
    text, whatever matplotlib's settings on this machine."""
    shown = []
    for name, label in names.items():
        points = [(line["epoch"] + 1, line.get(name)) for line in lines if abs(line.get(name) or 0.0) < HUGE]
        if points := [(epoch, value) for epoch, value in points if value is not None]:
            evaluation = name.startswith("eval_")
            shown.append((label, np.array(points, np.float64).T, evaluation, 1 if evaluation else window(len(points))))
    if not shown:
        return None

    def draw(axes: Any) -> None:
        if goal is not None:
            axes.axhline(goal, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
        for i, (_, (epochs, values), evaluation, size) in enumerate(shown):
            colour = LINES[i % len(LINES)]
            if size > 1:  # every epoch, faint
                axes.plot(epochs, values, color=colour, linewidth=1, alpha=0.38)
            dots = "o" if size == 1 and len(epochs) <= DOTS else ""
            axes.plot(epochs, moving_mean(values, size), color=colour, marker=dots, markersize=6)
            if evaluation and intervals:
                axes.vlines(*np.transpose(intervals), color=colour, alpha=0.65, linewidth=1.4)
        low, high = axes.get_ylim()
        if high - low < 1e-9 * abs(high):  # rounding errors are no curve
            axes.set_ylim(low - abs(low) / 10, high + abs(high) / 10)

    last = [(label, values[-1]) for label, (_, values), *_ in shown]
    return Diagram(title, unit, _svg(draw, "epochs"), last, max(size for *_, size in shown))


def bars(title: str, unit: str, label: str, values: Sequence[float | None], below: str) -> Diagram | None:
    """A bar for each of `values`, numbered from 0; the legend has their sum. None where nothing is known."""
    heights = np.array([value if value is not None and abs(value) < HUGE else np.nan for value in values], np.float64)
    if not np.isfinite(heights).any():
        return None

    def draw(axes: Any) -> None:
        axes.bar(np.arange(len(heights)), heights, 0.8, color=LINES[0])

    return Diagram(title, unit, _svg(draw, below), [(label, float(np.nansum(heights)))], 1)


def profile(settled: Mapping[str, Any]) -> str:
    """SVG of where a reward is settled (records/shapes.py): shares by state with their intervals, and the states of
    the trained window."""
    states, shares, *interval = np.transpose(
        [[each[key] for key in ("state", "share", "low", "high")] for each in settled["profile"]]
    )

    def draw(axes: Any) -> None:
        axes.axvspan(settled["window"][0], settled["window"][1] + 1, color=LINES[0], alpha=0.12, linewidth=0)
        axes.vlines(states, *interval, color=LINES[0], alpha=0.65, linewidth=1.4)
        axes.plot(states, shares, color=LINES[0], marker="o" if len(states) <= DOTS else "", markersize=6)

    return _svg(draw, "states")


def _svg(draw: Callable[[Any], None], below: str) -> str:
    """What `draw` puts into axes, without what is not ours."""
    import matplotlib.style  # now: it takes a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.style.context(["default", STYLE]):
        figure, file = Figure((WIDTH / 72, HEIGHT / 72)), io.StringIO()
        axes = figure.add_axes(PLOT_AREA)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel(below, loc="right", labelpad=0)
        draw(axes)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return re.sub("#00000[1-6]", lambda match: COLOURS[match[0]], NOT_OURS.sub("", file.getvalue()))


def window(count: int) -> int:
    """Points that a line of `count` points is averaged over: an odd number, a tenth of them, at least 3; 1 of few."""
    return 1 if count < SMOOTHED_FROM else max(3, count // 10 // 2 * 2 + 1)


def moving_mean(values: np.ndarray, size: int) -> np.ndarray:
    """Mean of the `size` (odd) values [n] around each; at the ends of as many on both sides as there are."""
    places = np.arange(len(values))
    reach = np.minimum(size // 2, np.minimum(places, places[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)
