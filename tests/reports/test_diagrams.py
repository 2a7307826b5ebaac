"""Diagrams: coordinates are those of the values, smoothing is a mean, thinning hides nothing."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from reports import diagrams


def test_a_smoothed_line_is_the_mean_of_the_epochs_around():
    values = np.random.default_rng(0).normal(size=50)
    assert [diagrams.window(count) for count in (1, 9, 10, 39, 40, 50, 1000)] == [1, 1, 3, 3, 5, 5, 101]
    found = diagrams.moving_mean(values, 5)
    for i in range(50):
        reach = min(2, i, 49 - i)
        assert found[i] == pytest.approx(values[i - reach : i + reach + 1].mean(), abs=1e-12)


def test_every_spike_of_a_thinned_line_is_seen():
    points = [(float(i), 0.0) for i in range(5000)]
    points[1234], points[4321] = (1234.0, 9.0), (4321.0, -7.0)
    values = [y for _, y in diagrams._extremes(points)]
    assert max(values) == 9.0 and min(values) == -7.0 and len(values) <= diagrams.RAW_POINTS


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.501, 0.7), (-3, 12000), (1e-9, 2e-9), (-1e30, 1e30), (4.9999, 5.0001), (0, 40)]
)
def test_ticks_are_few_round_and_inside(low, high):
    found = diagrams.ticks(low, high, 6)
    assert 2 <= len(found) <= 6 and low - 1e-9 * (high - low) <= found[0] and found[-1] <= high + 1e-9 * (high - low)
    steps = np.diff(found)
    assert np.allclose(steps, steps[0]) and f"{steps[0]:.2e}"[:4] in ("1.00", "2.00", "2.50", "5.00")


def test_a_diagram_says_what_was_measured():
    points = [(1.0, 0.25), (2.0, float("nan")), (3.0, 1e300), (4.0, 0.75)]
    one = diagrams.curves("t", "u", [diagrams.Series("s", points), diagrams.Series("none", [(1.0, float("inf"))])])
    (line,) = one.lines
    assert line.last == 0.75 and len(line.dots) == 2
    (x0, y0), (x1, y1) = line.dots
    assert (x0, x1) == (diagrams.LEFT, diagrams.RIGHT) and diagrams.TOP < y1 < y0 < diagrams.BOTTOM
    assert [label for _, label in one.x_ticks] == ["1", "2", "3", "4"]
    for y, label in one.y_ticks:  # labels stand at their values
        assert y == pytest.approx(y0 + (float(label) - 0.25) / 0.5 * (y1 - y0), abs=0.2)
    flat = diagrams.curves("t", "u", [diagrams.Series("s", [(1.0, 3.0)])])
    assert flat.lines[0].dots == [(pytest.approx(218, abs=1), pytest.approx(90, abs=1))]
    assert diagrams.curves("t", "u", [diagrams.Series("s", [])]) is None


def test_the_heat_map_is_each_epochs_histogram():
    columns = [(1, np.array([0.0] * 90 + [1.0] * 10)), (2, np.array([])), (3, np.array([1.0] * 100))]
    one = diagrams.heat_map("t", "u", columns)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(one.heat.partition("base64,")[2]))))
    opacity = pixels[..., 3] / 255
    assert opacity.shape == (20, 2) and [label for _, label in one.x_ticks] == ["1", "3"]
    assert opacity[-1] == pytest.approx([np.sqrt(0.9), 0], abs=0.01)
    assert opacity[0] == pytest.approx([np.sqrt(0.1), 1], abs=0.01) and not opacity[1:-1].any()
    assert one.lines[0].last == 1.0
    assert diagrams.heat_map("t", "u", [(1, np.array([]))]) is None
