"""Geometry of the report's diagrams: numbers in, SVG coordinates out; the template draws them, so that text stays text.

A diagram is WIDTH x HEIGHT units; its plot area lies within the margins. x counts epochs done (0: before training).
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 400, 206
LEFT, RIGHT, TOP, BOTTOM = 46, 390, 8, 172
SMOOTHED_FROM = 10  # points; fewer are shown as they are
RAW_POINTS, SMOOTH_POINTS, DOTS = 400, 200, 24  # of a line at most: a page of a long run stays small
HUGE = 1e100  # no diagram can show it
BINS = 8, 32  # of the heat map, up its side: as many as its columns' values can fill
HEAT = (58, 130, 220)  # legible on light and on dark; how many there are is its opacity

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One quantity over the epochs: `points` (epochs done, value), `intervals` (epochs done, low, high)."""

    label: str
    points: Sequence[Point]
    smooth: bool = True
    intervals: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Line:
    """A series as drawn: path data, and where dots and bars stand."""

    label: str
    last: float
    path: str
    raw: str  # every epoch, faint; empty where `path` is not smoothed
    dots: list[Point]
    bars: list[tuple[float, float, float]]  # x, y of the low and of the high end


@dataclass(frozen=True)
class Diagram:
    """`x_ticks` and `y_ticks`: (coordinate, label). `heat` is a picture that fills the plot area, as data URL."""

    title: str
    unit: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    window: int = 1  # epochs that the smoothed lines average over
    heat: str = ""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


@dataclass(frozen=True)
class _Scale:
    """Maps values from low..high to coordinates from start..end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def curves(title: str, unit: str, series: Sequence[Series]) -> Diagram | None:
    """Lines over the epochs, or None where no series has a point. What is not finite is left out."""
    shown = [(one, points) for one in series if (points := drawable(one.points))]
    if not shown:
        return None
    xs = [x for _, points in shown for x, _ in points]
    ys = [y for _, points in shown for _, y in points]
    intervals = {one.label: [bar for bar in one.intervals if all(map(math.isfinite, bar))] for one, _ in shown}
    ys += [end for bars in intervals.values() for _, *ends in bars for end in ends]
    x_scale, y_scale = _Scale(*_padded(xs, 0.0), LEFT, RIGHT), _Scale(*_padded(ys, 0.06), BOTTOM, TOP)
    lines, widest = [], 1
    for one, points in shown:
        size = window(len(points)) if one.smooth else 1
        widest = max(widest, size)
        means = [(x, y) for (x, _), y in zip(points, moving_mean([y for _, y in points], size), strict=True)]
        lines.append(
            Line(
                one.label,
                points[-1][1],
                _path(_thinned(means), x_scale, y_scale),
                _path(_extremes(points), x_scale, y_scale) if size > 1 else "",
                [(x_scale(x), y_scale(y)) for x, y in points] if len(points) <= DOTS and size == 1 else [],
                [(x_scale(x), y_scale(low), y_scale(high)) for x, low, high in intervals[one.label]],
            )
        )
    return Diagram(title, unit, lines, _labelled(x_scale, 6, whole=True), _labelled(y_scale, 6), widest)


def heat_map(title: str, unit: str, columns: Sequence[tuple[int, np.ndarray]]) -> Diagram | None:
    """How values are distributed in each of some epochs: `columns` are (epochs done, values [n] without NaN), in order.
    None where there is no value. A column's opacity is its share of the column's values; the line is the median."""
    columns = [(epoch, values) for epoch, values in columns if len(values)]
    if not columns:
        return None
    low, high = _padded([float(end) for _, values in columns for end in (values.min(), values.max())], 0.02)
    bins = int(np.clip(2 * np.sqrt(np.median([len(values) for _, values in columns])), *BINS))
    counts = np.stack([np.histogram(values, bins, (low, high))[0] / len(values) for _, values in columns], 1)[::-1]
    opacity = np.sqrt(counts / counts.max()) * 255  # the root: few are still seen
    pixels = np.empty((*counts.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = HEAT, opacity.round()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    y_scale = _Scale(low, high, BOTTOM, TOP)
    count = len(columns)
    width = (RIGHT - LEFT) / count
    middles = [round(LEFT + (i + 0.5) * width, 1) for i in range(count)]
    medians = [(x, y_scale(float(np.median(values)))) for x, (_, values) in zip(middles, columns, strict=True)]
    every = max(1, -(-count // 6))
    ticks = [(middles[i], str(columns[i][0])) for i in range(0, count, every)]
    line = Line(
        "median", float(np.median(columns[-1][1])), "M" + " L".join(f"{x:g} {y:g}" for x, y in medians), "",
        medians if count <= DOTS else [], [],
    )  # fmt: skip
    return Diagram(title, unit, [line], ticks, _labelled(y_scale, 6), heat=data_url("image/png", file.getvalue()))


def data_url(kind: str, content: bytes) -> str:
    """A file within the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def drawable(points: Sequence[Point]) -> list[Point]:
    """Those that are numbers of a size that can be drawn."""
    return [(x, y) for x, y in points if math.isfinite(y) and abs(y) < HUGE]


def window(count: int) -> int:
    """Points that a line of `count` points is averaged over: an odd number, a tenth of them, at least 3; 1 of few."""
    return 1 if count < SMOOTHED_FROM else max(3, count // 10 // 2 * 2 + 1)


def moving_mean(values: Sequence[float], size: int) -> list[float]:
    """Mean of the `size` (odd) values around each; at the ends of as many on both sides as there are."""
    half, count = size // 2, len(values)
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    reach = [min(half, i, count - 1 - i) for i in range(count)]
    return [float(sums[i + r + 1] - sums[i - r]) / (2 * r + 1) for i, r in enumerate(reach)]


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """At most `most` round numbers from low to high (low < high); only whole ones, if so wanted."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    if whole:
        step = max(1.0, step)
    factors = (1, 2, 5, 10, 20) if whole else (1, 2, 2.5, 5, 10, 20)
    step *= next(factor for factor in factors if (high - low) / (step * factor) <= most - 1 or factor == 20)
    first = math.ceil(low / step - 1e-9)
    found = [(first + i) * step for i in range(most + 1)]
    return [value for value in found if value <= high + step * 1e-9]


def _labelled(scale: _Scale, most: int, whole: bool = False) -> list[tuple[float, str]]:
    found = ticks(scale.low, scale.high, most, whole)
    largest = max(map(abs, found), default=0.0)
    places = max((len(f"{value:.6f}".rstrip("0").partition(".")[2]) for value in found), default=0)
    if largest >= 1e5 or 0 < largest < 1e-3:
        return [(scale(value), f"{value:.3g}") for value in found]
    return [(scale(value), f"{value + 0.0:.{places}f}") for value in found]


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    """The range of the values, a share of it wider on both sides; never empty."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
        pad = abs(low) * 0.1 or 0.5
        return low - pad, high + pad
    return low - share * (high - low), high + share * (high - low)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Evenly chosen ones, first and last among them."""
    if len(points) <= SMOOTH_POINTS:
        return list(points)
    return [points[i] for i in np.linspace(0, len(points) - 1, SMOOTH_POINTS).round().astype(int)]


def _extremes(points: Sequence[Point]) -> list[Point]:
    """Lowest and highest of equal stretches: a thinned line still shows every spike."""
    if len(points) <= RAW_POINTS:
        return list(points)
    found = []
    for part in np.array_split(np.arange(len(points)), RAW_POINTS // 2):
        values = [points[i][1] for i in part]
        ends = sorted({int(part[int(np.argmin(values))]), int(part[int(np.argmax(values))])})
        found += [points[i] for i in ends]
    return found


def _path(points: Sequence[Point], x_scale: _Scale, y_scale: _Scale) -> str:
    return "M" + " L".join(f"{x_scale(x):g} {y_scale(y):g}" for x, y in points)
