"""Memory against steps as an SVG: a panel a scenario, a line a kind, its bound dashed.

Knows numbers and how to draw them, no model. No plotting package is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#2563a8", "#c2571a", "#4b8b3b")
COLUMNS, WIDTH, HEIGHT = 2, 440, 270
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 40, 34
TITLE = 30


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over the same steps, and the bound of each by name."""

    title: str
    steps: Sequence[int]
    lines: Mapping[str, Sequence[float]]
    bounds: Mapping[str, float]


def draw(title: str, panels: Sequence[Panel]) -> str:
    """Return an SVG of all panels, from 0 up, two in a row."""
    rows = math.ceil(len(panels) / COLUMNS)
    width, height = COLUMNS * WIDTH, TITLE + rows * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(LEFT, 20, f"{title}; dashed: the bound", "start"),
    ]
    for number, panel in enumerate(panels):
        x, y = number % COLUMNS * WIDTH, TITLE + number // COLUMNS * HEIGHT
        parts += [f'<g transform="translate({x} {y})">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> list[str]:
    top = max([*panel.bounds.values(), *(max(line) for line in panel.lines.values())])
    unit = 10 ** math.floor(math.log10(top))
    unit = unit / 2 if top / unit < 3 else unit
    top = math.ceil(top / unit) * unit
    last = max(panel.steps)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top)

    parts = [_text(LEFT, TOP - 12, panel.title, "start")]
    for number in range(round(top / unit) + 1):
        value = number * unit
        parts.append(_line(x(0), y(value), x(last), y(value), "#e4e4e4"))
        parts.append(_text(LEFT - 8, y(value) + 4, f"{value:g}", "end"))
    for share in (0, 0.5, 1):
        parts.append(_text(x(last * share), HEIGHT - BOTTOM + 18, f"{last * share:g}", "middle"))
    for (name, line), colour in zip(panel.lines.items(), COLOURS, strict=False):
        points = zip(panel.steps, line, strict=True)
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        parts.append(_text(x(last), y(line[-1]) - 5, name, "end", colour))
        if name in panel.bounds:
            at = y(panel.bounds[name])
            dashed = _line(x(0), at, x(last), at, colour)
            parts.append(dashed.replace("/>", ' stroke-dasharray="5 4"/>'))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"
