"""Size against divergence as an SVG: bits a weight across, KL up (logarithmic), a line a recipe.

Knows points and how to draw them, no model. No plotting package is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 78, 24, 44, 52
COLOURS = ("#2563a8", "#c2571a", "#4b8b3b", "#7a4fa3")


@dataclass(frozen=True, slots=True)
class Point:
    """A label beside a dot at (bits a weight, mean KL in nats)."""

    label: str
    bits: float
    kl: float


def draw(title: str, lines: dict[str, Sequence[Point]], *, joined: set[str]) -> str:
    """Return an SVG of named series; those in `joined` get a line through their points.

    A KL must be above 0.
    """
    points = [point for series in lines.values() for point in series]
    bits_from = math.floor(min(point.bits for point in points))
    bits_to = max(math.ceil(max(point.bits for point in points)), bits_from + 1)
    low = math.floor(math.log10(min(point.kl for point in points)))
    high = max(math.ceil(math.log10(max(point.kl for point in points))), low + 1)

    def x(bits: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (bits - bits_from) / (bits_to - bits_from)

    def y(kl: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(kl)) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
    ]
    for bits in range(bits_from, bits_to + 1):
        parts.append(_line(x(bits), TOP, x(bits), HEIGHT - BOTTOM, "#e4e4e4"))
        parts.append(_text(x(bits), HEIGHT - BOTTOM + 18, str(bits), "middle"))
    for power in range(low, high + 1):
        parts.append(_line(LEFT, y(10**power), WIDTH - RIGHT, y(10**power), "#e4e4e4"))
        parts.append(_text(LEFT - 8, y(10**power) + 4, f"1e{power}", "end"))
    parts.append(
        _text(WIDTH / 2, HEIGHT - 12, "bits a weight of the decoder, scales counted", "middle")
    )
    parts.append(
        f'<text transform="translate(18 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
        "mean KL, nats</text>"
    )
    for (name, series), colour, row in zip(lines.items(), COLOURS, range(9), strict=False):
        ordered = sorted(series, key=lambda point: point.bits)
        if name in joined:
            path = " ".join(f"{x(point.bits):.1f},{y(point.kl):.1f}" for point in ordered)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        for point in ordered:
            across, up = x(point.bits), y(point.kl)
            parts.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="4" fill="{colour}"/>')
            if name in joined:
                parts.append(_text(across + 7, up - 6, point.label, "start", colour))
            else:  # out of the way of the lines' labels
                parts.append(_text(across - 7, up + 13, point.label, "end", colour))
        parts.append(_text(WIDTH - RIGHT - 8, TOP + 18 + 16 * row, name, "end", colour))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#333") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"
