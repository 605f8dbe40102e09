"""Paint shapes, numbers and backgrounds.

Knows colours, outlines and Pillow's bundled typeface. Refuses to know what makes a scene: where
shapes go and how many there are is decided in scenes.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 40),
    "orange": (245, 140, 25),
    "yellow": (245, 215, 50),
    "green": (45, 160, 65),
    "blue": (45, 90, 215),
    "purple": (130, 55, 170),
    "pink": (245, 130, 190),
    "black": (22, 22, 22),
}
BACKGROUNDS = (
    (250, 250, 250),
    (225, 225, 225),
    (248, 240, 215),
    (205, 225, 240),
    (212, 236, 215),
    (165, 170, 175),
    (55, 55, 60),
    (30, 36, 66),
    (24, 52, 44),
)
CONTRAST = 105.0  # least RGB distance between a colour and what lies under it


@dataclass(frozen=True, slots=True)
class Shape:
    """One coloured shape of a picture."""

    shape: str
    colour: str
    x: float  # centre and radius in pixels of the picture
    y: float
    radius: float
    place: str = ""  # "on the left"; empty where a scene does not say


@dataclass(frozen=True, slots=True)
class PrintedNumber:
    """What was printed, in which colour, and where each digit's centre is."""

    text: str
    colour: str
    centres: tuple[tuple[float, float], ...]


def colours_on(ground: tuple[int, int, int]) -> list[str]:
    """The colours that stand out on `ground`."""
    return [name for name, rgb in COLOURS.items() if math.dist(rgb, ground) >= CONTRAST]


def paint_background(
    rng: np.random.Generator, size: tuple[int, int], rgb: tuple[int, int, int]
) -> Image.Image:
    """Plain, a soft gradient, or mild noise."""
    width, height = size
    style = rng.choice(["plain", "gradient", "noise"])
    pixels = np.empty((height, width, 3), np.float32)
    pixels[:] = rgb
    if style == "gradient":
        ramp = np.linspace(-1, 1, width if rng.random() < 0.5 else height, dtype=np.float32)
        ramp = (
            ramp[None, :, None] if len(ramp) == width and width != height else ramp[:, None, None]
        )
        pixels = pixels + ramp * rng.uniform(-22, 22, 3).astype(np.float32)
    elif style == "noise":
        spread = int(rng.integers(4, 15))
        pixels = pixels + rng.integers(-spread, spread + 1, pixels.shape, dtype=np.int8)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")


def paint_shape(rng: np.random.Generator, draw: ImageDraw.ImageDraw, shape: Shape) -> None:
    fill = _paint(rng, shape.colour)
    tilt = math.radians(rng.uniform(-9, 9))
    x, y, r = shape.x, shape.y, shape.radius
    if shape.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        return
    cos, sin = math.cos(tilt), math.sin(tilt)
    corners = [(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in _polygon(shape.shape, r)]
    draw.polygon(corners, fill=fill)


def paint_number(
    rng: np.random.Generator, image: Image.Image, ground: tuple[int, int, int]
) -> PrintedNumber:
    """One or two digits in Pillow's own font, on the background or on a white plate."""
    digits = int(rng.integers(1, 3))
    number = str(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))
    plate = rng.random() < 0.3
    under = (252, 252, 252) if plate else ground
    colour = str(rng.choice(colours_on(under)))
    width, height = image.size
    em = min(width * 0.88 / (0.6 * digits), height * 0.95, max(image.size) * 0.75)
    size = max(30.0, em * rng.uniform(0.75, 0.98))
    font, stroke = ImageFont.load_default(size), round(size / 40)
    draw = ImageDraw.Draw(image)
    text = {"text": number, "font": font, "anchor": "mm", "stroke_width": stroke}
    left, top, right, bottom = draw.textbbox((0, 0), **text)
    slack_x, slack_y = width - (right - left), height - (bottom - top)
    x = width / 2 + slack_x * rng.uniform(-0.25, 0.25)
    y = height / 2 + slack_y * rng.uniform(-0.25, 0.25)
    if plate:
        edge = (bottom - top) * 0.16
        box = (x + left - edge, y + top - edge, x + right + edge, y + bottom + edge)
        draw.rounded_rectangle(box, edge, fill=under, outline=(40, 40, 40), width=2)
    draw.text((x, y), fill=_paint(rng, colour), **text)
    step = (right - left) / digits
    centres = tuple((x + left + step * (i + 0.5), y) for i in range(digits))
    return PrintedNumber(number, colour, centres)


def _paint(rng: np.random.Generator, colour: str) -> tuple[int, ...]:
    jitter = rng.integers(-10, 11, 3)
    return tuple(int(np.clip(c + j, 0, 255)) for c, j in zip(COLOURS[colour], jitter, strict=True))


def _polygon(shape: str, radius: float) -> list[tuple[float, float]]:
    """Corner points around the origin."""
    if shape == "square":
        h = radius * 0.85
        return [(-h, -h), (h, -h), (h, h), (-h, h)]
    if shape == "triangle":
        angles = [-90, 30, 150]
        return [
            (
                radius * 1.1 * math.cos(math.radians(a)),
                radius * 1.1 * math.sin(math.radians(a)) + radius * 0.2,
            )
            for a in angles
        ]
    if shape == "star":
        points = []
        for i in range(10):
            r = radius * (1.1 if i % 2 == 0 else 0.46)
            angle = math.radians(-90 + 36 * i)
            points.append((r * math.cos(angle), r * math.sin(angle)))
        return points
    arm, bar = radius, radius * 0.33  # a cross
    return [
        (-bar, -arm),
        (bar, -arm),
        (bar, -bar),
        (arm, -bar),
        (arm, bar),
        (bar, bar),
        (bar, arm),
        (-bar, arm),
        (-bar, bar),
        (-arm, bar),
        (-arm, -bar),
        (-bar, -bar),
    ]
