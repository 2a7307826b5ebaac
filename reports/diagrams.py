"""The report's diagrams: numbers in, SVG out, drawn by matplotlib. x counts epochs done (0: before training).

Titles and labels, which may be anybody's words, are left to the template. The colours are the page's CSS variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from reports.summary import Line

if TYPE_CHECKING:  # matplotlib is imported when a diagram is drawn: it takes a second
    from matplotlib.axes import Axes

Interval = tuple[float, float, float]  # epochs done, low, high
WIDTH, HEIGHT = 400, 206  # of a diagram, in its own units
PLOT_AREA = (0.16, 0.19, 0.82, 0.74)  # left, bottom, width, height, as shares of the diagram
SMOOTHED_FROM = 10  # points; fewer are shown as they are
DOTS = 24  # at most, that are marked one by one
HUGE = 1e100  # no diagram can show it
BINS = 8, 32  # of the heat map, up its side: as many as its columns' values can fill
HEAT = "#3a82dc"  # legible on light and on dark; how many there are is its opacity
# What matplotlib is told (black would be left out), and what the page says in its place.
COLOURS = {f"#00000{i}": f"var(--{name})" for i, name in enumerate(("c0", "c1", "c2", "c3", "line", "soft", "ink"), 1)}
*LINES, RULE, SOFT, INK = COLOURS
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "tributary", "text.parse_math": False, "font.sans-serif": "DejaVu Sans",
    "font.size": 13, "figure.facecolor": "none", "axes.facecolor": "none", "image.interpolation": "none",
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
    window: int = 1
    heat: bool = False


def curves(
    title: str, unit: str, names: Mapping[str, str], lines: Sequence[Line], intervals: Sequence[Interval] = ()
) -> Diagram | None:
    """Metrics over the epochs, by name with their labels, or None where there is no point. What is not finite is left
    out. Evaluations, which `intervals` are of, are few and of the same images: not smoothed."""
    shown = []
    for name, label in names.items():
        points = [(line["epoch"] + 1, line.get(name)) for line in lines if abs(line.get(name) or 0.0) < HUGE]
        if points := [(epoch, value) for epoch, value in points if value is not None]:
            shown.append((label, np.array(points, np.float64).T, name.startswith("eval_")))
    if not shown:
        return None
    sizes = [1 if evaluation else window(len(epochs)) for _, (epochs, _), evaluation in shown]

    def paint(axes: Axes) -> None:
        for i, ((_, (epochs, values), evaluation), size) in enumerate(zip(shown, sizes, strict=True)):
            colour = LINES[i % len(LINES)]
            if size > 1:  # every epoch, faint
                axes.plot(epochs, values, color=colour, linewidth=1, alpha=0.38)
            dots = "o" if size == 1 and len(epochs) <= DOTS else ""
            axes.plot(epochs, moving_mean(values, size), color=colour, marker=dots, markersize=6)
            if evaluation and intervals:
                axes.vlines(*np.transpose(intervals), color=colour, alpha=0.65, linewidth=1.4)

    return Diagram(title, unit, _svg(paint), [(label, values[-1]) for label, (_, values), _ in shown], max(sizes))


def heat_map(title: str, unit: str, columns: Sequence[tuple[int, np.ndarray]]) -> Diagram | None:
    """How values are distributed in each of some epochs: `columns` are (epochs done, values [n] without NaN), in order.
    None where there is no value. A column's opacity is its share of the column's values; the line is the median."""
    columns = [(epoch, values) for epoch, values in columns if len(values)]
    if not columns:
        return None
    bins = int(np.clip(2 * np.sqrt(np.median([len(values) for _, values in columns])), *BINS))
    edges = np.histogram_bin_edges(np.concatenate([values for _, values in columns]), bins)
    shares = np.stack([np.histogram(values, edges)[0] / len(values) for _, values in columns], 1)
    medians = [float(np.median(values)) for _, values in columns]

    def paint(axes: Axes) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        count, every = len(columns), -(-len(columns) // 6)
        opacity = LinearSegmentedColormap.from_list("opacity", [f"{HEAT}00", f"{HEAT}ff"])
        extent = (-0.5, count - 0.5, edges[0], edges[-1])
        axes.imshow(np.sqrt(shares), opacity, vmin=0, origin="lower", aspect="auto", extent=extent)  # few are seen, too
        axes.plot(medians, color=INK, linewidth=1.6, marker="o" if count <= DOTS else "", markersize=6)
        axes.set_xticks(range(0, count, every), [str(epoch) for epoch, _ in columns[::every]])

    return Diagram(title, unit, _svg(paint), [("median", medians[-1])], heat=True)


def _svg(paint: Callable[[Axes], None]) -> str:
    """What `paint` draws. Equal numbers give equal text, whatever matplotlib's settings on this machine."""
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.style.context(["default", STYLE]):
        figure, file = Figure((WIDTH / 72, HEIGHT / 72)), io.StringIO()
        axes = figure.add_axes(PLOT_AREA)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel("epochs", loc="right", labelpad=0)
        paint(axes)
        low, high = axes.get_ylim()
        if high - low < 1e-9 * abs(high):  # rounding errors are no curve
            axes.set_ylim(low - abs(low) / 10, high + abs(high) / 10)
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return re.sub("#00000[1-7]", lambda match: COLOURS[match[0]], NOT_OURS.sub("", file.getvalue()))


def window(count: int) -> int:
    """Points that a line of `count` points is averaged over: an odd number, a tenth of them, at least 3; 1 of few."""
    return 1 if count < SMOOTHED_FROM else max(3, count // 10 // 2 * 2 + 1)


def moving_mean(values: np.ndarray, size: int) -> np.ndarray:
    """Mean of the `size` (odd) values [n] around each; at the ends of as many on both sides as there are."""
    places = np.arange(len(values))
    reach = np.minimum(size // 2, np.minimum(places, places[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)
