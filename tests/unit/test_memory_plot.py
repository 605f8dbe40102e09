"""The plot of memory: lines and bounds are in their panel's frame, a bound above its line."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.memory_plot import COLUMNS, HEIGHT, TITLE, WIDTH, Panel, draw

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("count", [1, 3, 4])
def test_lines_and_bounds_are_drawn_inside_their_panels(count: int) -> None:
    panel = Panel("a & b", (1, 2, 3), {"live": (1.0, 5.0, 4.0)}, {"live": 6.5})
    root = ElementTree.fromstring(draw("MiB", [panel] * count))
    assert root.get("width") == str(COLUMNS * WIDTH)
    assert root.get("height") == str(TITLE + (count + 1) // 2 * HEIGHT)
    groups = list(root.iter(f"{SVG}g"))
    assert len(groups) == count
    for group in groups:
        (line,) = group.iter(f"{SVG}polyline")
        points = [tuple(map(float, point.split(","))) for point in line.get("points", "").split()]
        assert len(points) == 3
        assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in points)
        assert [x for x, _ in points] == sorted(x for x, _ in points)
        (bound,) = [p for p in group.iter(f"{SVG}path") if p.get("stroke-dasharray")]
        height = float(bound.get("d", "").split()[1].split("L")[0])
        assert 0 < height < min(y for _, y in points)
