"""The report's diagrams: numbers in, SVG out, drawn by matplotlib. x counts epochs done (0: before training).

The SVG holds numbers alone: titles and labels, which may be anybody's words, are left to the template. Its colours are
the page's CSS variables, so one drawing serves light and dark.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # matplotlib is imported when a diagram is drawn: it takes a second
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 400, 206  # of a diagram, in its own units
PLOT_AREA = (0.16, 0.19, 0.82, 0.74)  # left, bottom, width, height, as shares of the diagram
SMOOTHED_FROM = 10  # points; fewer are shown as they are
DOTS, POINTS = 24, 400  # that are marked one by one, and that a line has, at most: a long run's page stays small
HUGE = 1e100  # no diagram can show it
BINS = 8, 32  # of the heat map, up its side: as many as its columns' values can fill
HEAT = (58, 130, 220)  # legible on light and on dark; how many there are is its opacity
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
}  # fmt: skip
# What goes of matplotlib's file: all around the drawing, a style for the whole page, ids that every drawing has,
# clipping (nothing reaches out), and decimals of a path beyond the second.
NOT_OURS = re.compile(
    r'^.*?<svg[^>]*>|</svg>\s*$|<defs>\s*<(?:style|clipPath).*?</defs>| id="[\w.]+_\d+"| clip-path="[^"]*"|\n *'
    r"|(?<=\.\d\d)\d+(?= )",
    re.DOTALL,
)


@dataclass(frozen=True)
class Series:
    """One quantity over the epochs: `points` (epochs done, value), `intervals` (epochs done, low, high)."""

    label: str
    points: Sequence[tuple[float, float]]
    smooth: bool = True
    intervals: Sequence[tuple[float, float, float]] = ()


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


def curves(title: str, unit: str, series: Sequence[Series]) -> Diagram | None:
    """Lines over the epochs, or None where no series has a point. What is not finite is left out."""
    drawable = [(line, [point for point in line.points if abs(point[1]) < HUGE]) for line in series]
    shown = [(line, points) for line, points in drawable if points]
    if not shown:
        return None
    sizes = [window(len(points)) if line.smooth else 1 for line, points in shown]

    def paint(axes: Axes) -> None:
        for i, ((line, points), size) in enumerate(zip(shown, sizes, strict=True)):
            epochs, values = np.array(points, np.float64).T
            colour = LINES[i % len(LINES)]
            if size > 1:  # every epoch, faint
                axes.plot(*thinned(epochs, values), color=colour, linewidth=1, alpha=0.38)
            dots = "o" if size == 1 and len(points) <= DOTS else ""
            axes.plot(*thinned(epochs, moving_mean(values, size)), color=colour, marker=dots, markersize=6)
            for epoch, low, high in line.intervals:
                if math.isfinite(low) and math.isfinite(high):
                    axes.vlines(epoch, low, high, color=colour, alpha=0.65, linewidth=1.4)

    return Diagram(title, unit, _svg(paint), [(line.label, points[-1][1]) for line, points in shown], max(sizes))


def heat_map(title: str, unit: str, columns: Sequence[tuple[int, np.ndarray]]) -> Diagram | None:
    """How values are distributed in each of some epochs: `columns` are (epochs done, values [n] without NaN), in order.
    None where there is no value. A column's opacity is its share of the column's values; the line is the median."""
    columns = [(epoch, values) for epoch, values in columns if len(values)]
    if not columns:
        return None
    bins = int(np.clip(2 * np.sqrt(np.median([len(values) for _, values in columns])), *BINS))
    edges = np.histogram_bin_edges(np.concatenate([values for _, values in columns]), bins)
    counts = np.stack([np.histogram(values, edges)[0] / len(values) for _, values in columns], 1)
    pixels = np.empty((*counts.shape, 4), np.uint8)
    pixels[..., :3] = HEAT
    pixels[..., 3] = (np.sqrt(counts / counts.max()) * 255).round()  # the root: few are still seen
    medians = [float(np.median(values)) for _, values in columns]

    def paint(axes: Axes) -> None:
        count, every = len(columns), -(-len(columns) // 6)
        axes.imshow(pixels, origin="lower", aspect="auto", extent=(-0.5, count - 0.5, edges[0], edges[-1]))
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
    text = NOT_OURS.sub("", file.getvalue())
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    return text


def data_url(kind: str, content: bytes) -> str:
    """A file within the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def window(count: int) -> int:
    """Points that a line of `count` points is averaged over: an odd number, a tenth of them, at least 3; 1 of few."""
    return 1 if count < SMOOTHED_FROM else max(3, count // 10 // 2 * 2 + 1)


def moving_mean(values: np.ndarray, size: int) -> np.ndarray:
    """Mean of the `size` (odd) values [n] around each; at the ends of as many on both sides as there are."""
    places = np.arange(len(values))
    reach = np.minimum(size // 2, np.minimum(places, places[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


def thinned(epochs: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS of the values [n] and their epochs: the lowest and the highest of equal stretches."""
    if len(values) <= POINTS:
        return epochs, values
    stretches = np.array_split(np.arange(len(values)), POINTS // 2)
    places = sorted({int(some[end(values[some])]) for some in stretches for end in (np.argmin, np.argmax)})
    return epochs[places], values[places]
