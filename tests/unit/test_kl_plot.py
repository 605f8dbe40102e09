"""The plot of size against divergence: every point is in it and in the frame."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks.kl_plot import HEIGHT, WIDTH, Point, draw

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    "points",
    [
        [Point("int4", 4.5, 7e-5)],
        [Point("int2 <low>", 2.5, 5e-2), Point("int8", 8.5, 3e-7), Point("int4", 4.0, 1e-4)],
    ],
)
def test_every_point_is_drawn_inside_the_frame(points: list[Point]) -> None:
    root = ElementTree.fromstring(draw("demo & co", {"affine": points}, joined={"affine"}))
    dots = [
        (float(dot.get("cx", -1)), float(dot.get("cy", -1))) for dot in root.iter(f"{SVG}circle")
    ]
    assert len(dots) == len(points)
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in dots)
    assert dots == sorted(dots), "more bits are to the right, and here lower"
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {point.label for point in points} | {"demo & co", "affine"} <= texts
