"""Diagrams: dots stand at their values, smoothing is a mean, thinning hides nothing, colours are the page's."""

import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest

from reports import diagrams
from reports.diagrams import curves

LEFT = diagrams.PLOT_AREA[0] * diagrams.WIDTH


def labels(svg: str) -> list[tuple[float, float, str]]:
    """(x, y, text) of what is written beside the axes."""
    found = re.findall(r'<text [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', svg)
    return [(float(x), float(y), text.replace("\N{MINUS SIGN}", "-")) for x, y, text in found]


def dots(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<use xlink:href="#m\w+" x="([\d.]+)" y="([\d.]+)"', svg)]


def lines(values) -> list[dict]:
    return [{"epoch": i, "x": value, "eval_x": value} for i, value in enumerate(values)]


def test_a_smoothed_line_is_the_mean_of_the_epochs_around():
    values = np.random.default_rng(0).normal(size=50)
    assert [diagrams.window(count) for count in (1, 9, 10, 39, 40, 50, 1000)] == [1, 1, 3, 3, 5, 5, 101]
    means = diagrams.moving_mean(values, 5)
    for i in range(50):
        reach = min(2, i, 49 - i)
        assert means[i] == pytest.approx(values[i - reach : i + reach + 1].mean(), abs=1e-12)


def test_every_spike_of_a_long_line_is_seen_and_a_long_run_stays_small():
    values = np.zeros(5000)
    values[[1234, 4321]] = 9.0, -7.0
    svg = curves("t", "u", {"eval_x": "s"}, lines(values)).svg
    (path,) = re.findall(r'd="(M [^"]+)" style="fill: none; stroke: var\(--c0', svg)
    heights = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path)]
    top, middle, bottom = min(heights), heights[0], max(heights)
    assert len(heights) < 20 and (middle - top) / (bottom - middle) == pytest.approx(9 / 7, abs=0.01)
    noise = np.random.default_rng(0).normal(size=10_000)
    diagram = curves("t", "u", {"x": "s"}, lines(noise))
    assert diagram.window == 1001 and len(diagram.svg) < 20_000 and not dots(diagram.svg)


def test_dots_stand_at_their_values_and_intervals_are_bars():
    values = [0.25, float("nan"), 1e300, 0.75]
    diagram = curves("t", "u", {"x": "s", "none": "none"}, [{**line, "none": float("inf")} for line in lines(values)])
    assert diagram.lines == [("s", 0.75)] and diagram.window == 1
    (x0, y0), (x1, y1) = dots(diagram.svg)
    across = {text: x for x, _, text in labels(diagram.svg) if text in "1234"}
    assert list(across) == ["1", "2", "3", "4"] and (x0, x1) == pytest.approx((across["1"], across["4"]), abs=0.1)
    named = [float(text) for x, _, text in labels(diagram.svg) if x < LEFT]
    rule = r'd="M [\d.]+ ([\d.]+) L [^"]+" style="fill: none; stroke: var\(--line\)'
    rules = [float(y) for y in re.findall(rule, diagram.svg)]
    up = np.polyfit(named, rules, 1)
    assert len(named) == len(rules) > 2 and (y0, y1) == pytest.approx(np.polyval(up, (0.25, 0.75)), abs=0.1) and y1 < y0
    assert len(dots(curves("t", "u", {"x": "s"}, lines([3.0])).svg)) == 1
    assert curves("t", "u", {"x": "s"}, lines([None])) is None
    bars = [(1.0, 0.4, 0.6), (2.0, 0.3, 0.6)]
    both = [{**line, "y": 0.5} for line in lines([0.5, 0.5])]
    assert curves("t", "u", {"x": "s", "y": "z"}, both, bars).svg.count("stroke-opacity: 0.65") == 0
    assert curves("t", "u", {"eval_y": "s"}, [{**line, "eval_y": 0.5} for line in both], bars).svg.count("0.65") == 2


def test_what_is_beside_the_axis_is_short():
    for ends in ((0, 1), (0.501, 0.7), (-3, 12000), (1e-9, 2e-9), (-1e30, 1e30), (4.9999, 5.0001), (0.1, 0.1 + 1e-16)):
        beside = [text for x, _, text in labels(curves("t", "u", {"x": "s"}, lines(ends)).svg) if x < LEFT]
        assert 2 <= len(beside) <= 8 and max(map(len, beside)) <= 7


def test_colours_are_the_pages_and_nothing_is_left_of_this_machine():
    def draw() -> str:
        noise = np.random.default_rng(0).normal(size=(5, 60))
        rows = [{"epoch": i, **{str(k): value for k, value in enumerate(column)}} for i, column in enumerate(noise.T)]
        names = [*map(str, range(5)), "few"]
        return curves("t", "u", dict(zip(names, names, strict=True)), [{**rows[0], "few": 1.0}, *rows]).svg

    svg = draw()
    for name in ("c0", "c1", "c2", "c3", "line", "soft"):
        assert f"var(--{name})" in svg
    assert not re.search(r"#[0-9a-f]{6}\b|url\(|<style|<metadata|<defs>\s*</defs>|https?:|_\d+\"", svg)
    with matplotlib.rc_context({"lines.linestyle": "--", "xtick.labelsize": 30, "svg.hashsalt": "other"}):
        assert draw() == svg  # whoever draws it, with whatever settings


@pytest.mark.long
def test_matplotlib_is_imported_only_to_draw():
    command = "import sys, reports.html, reports.pictures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], timeout=120).returncode == 0
